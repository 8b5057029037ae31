"""What both doors spell by themselves, held against Flower's own way of spelling it."""

import inspect
import os

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto import runtime_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from clients import fleet
from server import posting
from server.grid_cohort import MESSAGE_TYPE
from server.replies import FIELD, RECORD


@pytest.fixture(autouse=True)
def _within_a_run(monkeypatch):
    for name, value in {"_run_id": 7, "_node_id": 1, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


def by_flower(message):
    return {name: item.deflate() for name, item in get_all_nested_objects(message).items()}


def messages(*nodes):
    content = RecordDict({RECORD: ConfigRecord({FIELD: os.urandom(3000)})})
    return [Message(content, node, MESSAGE_TYPE, ttl=60.0) for node in nodes]


def test_a_coordinators_messages_are_spelt_as_flower_spells_them_and_what_they_share_once():
    given = messages(7, 8)
    expected = by_flower(given[0]) | by_flower(given[1])
    with no_object_id_recompute():
        assert posting._bodies(given) == expected
    assert len(expected) == 4


def test_a_nodes_reply_is_spelt_as_flower_spells_it():
    (request,) = messages(7)
    for reply in (Message(request.content, reply_to=request), Message(Error(2, "no"), reply_to=request)):
        expected = by_flower(reply)
        with no_object_id_recompute():
            assert fleet._bodies(reply) == expected


def test_the_private_calls_of_the_post_have_kept_their_signatures():
    assert list(inspect.signature(RuntimeHttpClient.PushMessages).parameters) == ["self", "request"]
    assert list(inspect.signature(RuntimeHttpClient.PushObject).parameters) == ["self", "request"]
    assert {"node", "run_id", "session_id"} <= set(inspect.signature(make_push_object_fn_protobuf).parameters)
    fields = runtime_pb2.PushAppMessagesRequest.DESCRIPTOR.fields_by_name
    assert {"messages_list", "message_object_trees"} <= set(fields)
