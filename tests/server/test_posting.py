"""What both doors spell by themselves, held against Flower's own way of spelling it."""

import inspect
import os

import pytest
from flwr.app import ConfigRecord, Error, Message
from flwr.proto import runtime_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from clients import outgoing
from clients.wire import wrap
from fedgrade.federation.pieces import MESSAGE_TYPE, PIECE_BYTES
from server import posting


@pytest.fixture(autouse=True)
def _within_a_run(monkeypatch):
    for name, value in {"_run_id": 7, "_node_id": 1, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


def by_flower(*messages):
    """What Flower sends of ``messages``, and of it the records."""
    items = {name: item for message in messages for name, item in get_all_nested_objects(message).items()}
    everything = {name: item.deflate() for name, item in items.items()}
    return everything, {name: everything[name] for name, item in items.items() if isinstance(item, ConfigRecord)}


def names(*messages):
    return {tree.object_id for message in messages for tree in iterate_object_tree(get_object_tree(message))}


def messages(*nodes, size=3000):
    content = wrap(os.urandom(size))
    return [Message(content, node, MESSAGE_TYPE, ttl=60.0) for node in nodes]


@pytest.mark.parametrize("size", [3000, 2 * PIECE_BYTES + 5])
def test_a_coordinators_messages_are_spelt_as_flower_spells_them_and_what_they_share_once(size):
    given = messages(7, 8, size=size)
    everything, records = by_flower(*given)
    with no_object_id_recompute():
        assert posting._records(given) == records
        assert names(*given) == everything.keys()
    assert len(everything) == 3 + len(records)
    assert len(records) == 1 + size // PIECE_BYTES


def test_a_nodes_reply_is_spelt_as_flower_spells_it():
    (request,) = messages(7)
    answer, error = Message(request.content, reply_to=request), Message(Error(2, "no"), reply_to=request)
    for reply in (answer, error):
        everything, records = by_flower(reply)
        with no_object_id_recompute():
            assert outgoing._records(reply) == (everything if reply is error else records)
            assert names(reply) == everything.keys()


def test_the_private_calls_of_the_post_have_kept_their_signatures():
    assert list(inspect.signature(RuntimeHttpClient.PushMessages).parameters) == ["self", "request"]
    assert list(inspect.signature(RuntimeHttpClient.PushObject).parameters) == ["self", "request"]
    assert {"node", "run_id", "session_id"} <= set(inspect.signature(make_push_object_fn_protobuf).parameters)
    fields = runtime_pb2.PushAppMessagesRequest.DESCRIPTOR.fields_by_name
    assert {"messages_list", "message_object_trees"} <= set(fields)
