"""A node's reply as it is sent: every object of it spelt once, and kept until it is surely gone.

Knows how Flower spells and names what it carries (pinned ``>=1.41,<1.42``; tests/server/test_posting.py holds it).
"""

from dataclasses import dataclass, field
from typing import Final

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    _get_computed_object_ids,
    get_object_id,
    get_object_tree,
    no_object_id_recompute,
)

from clients.wire import wrap

_MAX_REASON_CHARACTERS: Final = 300


@dataclass(kw_only=True)
class Outgoing:
    """A reply on its way, which goes on from where it was cut off.

    Announced anew it would be a second reply to one request, which Flower does not take once the first is known.

    Attributes:
        message: the reply.
        tree: what holds what in it.
        left: what is still to be sent of it, by name.
        session: the SuperLink's name for this push, once it is announced.
        refused: names of what the SuperLink did not take.
    """

    message: Message
    tree: ObjectTree
    left: dict[str, bytes]
    session: str | None = None
    refused: set[str] = field(default_factory=set)


def answer_to(request: Message, envelope: bytes) -> Outgoing:
    """``envelope``, on its way back to the sender of ``request``."""
    return _outgoing(Message(wrap(envelope), reply_to=request))


def refusal_of(request: Message, reason: str) -> Outgoing:
    """One line that says why ``request`` is not answered."""
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason[:_MAX_REASON_CHARACTERS])
    return _outgoing(Message(error, reply_to=request))


def _outgoing(message: Message) -> Outgoing:
    with no_object_id_recompute():
        records = _records(message)
        message.metadata.__dict__["_message_id"] = message.object_id
        return Outgoing(message=message, tree=get_object_tree(message), left=records)


def _records(message: Message) -> dict[str, bytes]:
    """What of ``message`` is sent, by its name: its records, or the message itself if it has none.

    Within ``no_object_id_recompute``. Flower by itself spells and hashes the whole reply three times, each time in
    several copies. Children are named first: what holds them then finds their names.
    """
    if not message.has_content():
        return dict([_named(message)])
    records = dict(_named(record) for record in message.content.values())
    for holder in (message.content, message):
        _named(holder)
    return records


def _named(item: InflatableObject) -> tuple[str, bytes]:
    """The name of ``item``, which Flower goes by from now on, and what it is sent as."""
    body = item.deflate()
    name = get_object_id(body)
    item.__dict__["_object_id"] = name
    _get_computed_object_ids().add(name)
    return name, body
