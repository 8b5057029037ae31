"""How requests reach the SuperLink: any Grid by its public method, or Flower's HttpGrid with every object spelt once.

Knows flwr's private ``HttpGrid`` (pinned ``>=1.41,<1.42``; tests/server/test_flwr_contract.py holds the names).
``HttpGrid.push_messages`` spells and hashes what a message carries six times over for three sites, each time in several
copies: at a hundred megabytes, most of a round.
"""

from collections.abc import Sequence
from typing import Protocol

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    _get_computed_object_ids,
    get_object_id,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import push_object_contents_from_iterable
from flwr.superlink.grid import HttpGrid


class Post(Protocol):
    """Takes messages."""

    def send(self, messages: Sequence[Message]) -> set[str]:
        """Ids of those that the SuperLink took.

        Raises:
            ObjectPushError: it did not take what one of them carries.
        """


def post_of(grid: Grid) -> Post:
    """The fitting post for ``grid``."""
    return _HttpPost(grid) if isinstance(grid, HttpGrid) else _GridPost(grid)


class _GridPost:
    """Any Grid, by its public method."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def send(self, messages: Sequence[Message]) -> set[str]:
        return set(self._grid.push_messages(messages))


class _HttpPost:
    """Flower's HttpGrid: one request that announces all messages, then what the SuperLink does not have yet."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._client = grid._runtime_client  # noqa: SLF001
        self._run_id = grid.run.run_id

    def send(self, messages: Sequence[Message]) -> set[str]:
        with no_object_id_recompute():
            records = _records(messages)
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
            trees = [get_object_tree(message) for message in messages]
        bare = [message_to_proto(remove_content_from_message(message)) for message in messages]
        announced = self._client.PushMessages(PushAppMessagesRequest(messages_list=bare, message_object_trees=trees))
        push = make_push_object_fn_protobuf(
            self._client.PushObject, self._grid.node, self._run_id, announced.session_id
        )
        missing = [(name, records[name]) for name in records if name in announced.objects_to_push]
        push_object_contents_from_iterable(missing, push)
        return set(announced.message_ids)


def _records(messages: Sequence[Message]) -> dict[str, bytes]:
    """What the records of ``messages`` are sent as, by their names; what holds them is named, and never sent.

    Within ``no_object_id_recompute``. Children are named first: what holds them then finds their names and does not
    spell them anew.
    """
    contents = {id(message.content): message.content for message in messages}.values()
    records = dict(_named(record) for content in contents for record in content.values())
    for holder in (*contents, *messages):
        _named(holder)
    return records


def _named(item: InflatableObject) -> tuple[str, bytes]:
    """The name of ``item``, which Flower goes by from now on, and what it is sent as."""
    body = item.deflate()
    name = get_object_id(body)
    item.__dict__["_object_id"] = name
    _get_computed_object_ids().add(name)
    return name, body
