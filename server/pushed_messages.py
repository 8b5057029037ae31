"""What a node may push: one reply of its own, with as many objects as a reply has.

Flower's handler takes any message: also one that answers nothing, in the SuperLink's name, with as many objects as
whoever sends it names, all of which the SuperLink then keeps in memory for as long as the run is on.
"""

from typing import Final

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStore

# What clients/fleet.py sends: a record in a dictionary in a message, or a message that has an error.
_REPLY_OBJECTS: Final = 3
_ERROR_OBJECTS: Final = 1
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
    allowed = _ERROR_OBJECTS if message.HasField("error") else _REPLY_OBJECTS
    if tree.object_id != message.metadata.message_id or not _is_chain(tree, allowed):
        raise HTTPException(
            400, f"push-messages: the objects must be the message and what it holds, one in another, {allowed} at most"
        )
    if _differs(store, tree):
        raise HTTPException(403, "push-messages: this message was announced before with other objects")


def _is_chain(tree: ObjectTree, allowed: int) -> bool:
    """Whether each object holds one other, and there are at most ``allowed``."""
    found = 1
    while len(tree.children) == 1 and found < allowed:
        tree, found = tree.children[0], found + 1
    return not tree.children


def _differs(store: ObjectStore, tree: ObjectTree) -> bool:
    """Whether the same message is there with other objects; Flower would keep these too."""
    try:
        return bool(store.get_object_tree(tree.object_id) != tree)
    except NoObjectInStoreError:
        return False
