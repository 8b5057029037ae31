"""What a node may push: one reply of its own, with as many objects as a reply has.

Flower's handler takes any message: also one that answers nothing, in the SuperLink's name, with as many objects as
whoever sends it names, all of which the SuperLink then keeps in memory for as long as the run is on.
"""

from typing import Final

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStore

from fedgrade.federation.messages import MAX_MESSAGE_BYTES
from fedgrade.federation.pieces import most_pieces

# What clients/fleet.py sends: records in a dictionary in a message, or a message that has an error.
_RECORDS: Final = most_pieces(MAX_MESSAGE_BYTES)
_MESSAGE_BYTES: Final = 64 * 1024  # without its objects; an error's reason is in it


def require_own_reply(request: PushMessagesRequest, store: ObjectStore) -> None:
    """Take one reply in the name of the request's node, which its key was found to own.

    Raises:
        HTTPException: 400, another shape than a reply's; 403, another node's message, one that answers none, or one
            that was announced before with other objects.
    """
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise HTTPException(
            400,
            f"push-messages: {len(request.messages_list)} messages and {len(request.message_object_trees)} object "
            "trees; exactly one of each is taken",
        )
    message, tree = request.messages_list[0], request.message_object_trees[0]
    if message.metadata.src_node_id != request.node.node_id:
        raise HTTPException(403, "push-messages: the message is in another node's name")
    if not message.metadata.reply_to_message_id:
        raise HTTPException(403, "push-messages: the message answers none; a node sends replies alone")
    if message.ByteSize() > _MESSAGE_BYTES:
        raise HTTPException(400, f"push-messages: a message is at most {_MESSAGE_BYTES} bytes without its objects")
    fits = not tree.children if message.HasField("error") else _is_reply(tree)
    if tree.object_id != message.metadata.message_id or not fits:
        raise HTTPException(
            400,
            "push-messages: the objects must be those of the message: none if it is an error, or a dictionary with 1 "
            f"to {_RECORDS} records",
        )
    if _differs(store, tree):
        raise HTTPException(403, "push-messages: this message was announced before with other objects")


def _is_reply(tree: ObjectTree) -> bool:
    """Whether the message holds one dictionary, with records that hold nothing."""
    records = tree.children[0].children if len(tree.children) == 1 else []
    return 0 < len(records) <= _RECORDS and not any(record.children for record in records)


def _differs(store: ObjectStore, tree: ObjectTree) -> bool:
    """Whether the same message is there with other objects; Flower would keep these too."""
    try:
        return _shape(store.get_object_tree(tree.object_id)) != _shape(tree)
    except NoObjectInStoreError:
        return False


def _shape(tree: ObjectTree) -> dict[str, frozenset[str]]:
    """What holds what; a store need not keep the order."""
    return {one.object_id: frozenset(child.object_id for child in one.children) for one in iterate_object_tree(tree)}
