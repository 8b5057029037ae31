"""What a node may push, as clients/fleet.py pushes it and as nobody should."""

import uuid
from datetime import UTC, datetime

import pytest
from fastapi import HTTPException
from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity

from clients.fleet import FleetAccess, FleetConnection, LinkRefused, Parcel
from clients.node_key import create_node_key, load_node_key
from clients.outgoing import answer_to, refusal_of
from clients.wire import wrap
from fedgrade.federation.messages import MAX_MESSAGE_BYTES
from fedgrade.federation.pieces import MESSAGE_TYPE, PIECE_BYTES, most_pieces
from server.certificates import certify
from server.pushed_messages import require_own_reply

RUN, NODE = 7, 11


class Outgoing:
    """What a node's own connection would send."""

    def __init__(self, folder):
        create_node_key(folder / "key")
        files = certify(folder / "tls", [], now=datetime.now(UTC))
        access = FleetAccess(
            address="127.0.0.1:1",
            root_certificate=files.authority.read_bytes(),
            key=load_node_key(folder / "key"),
            max_message_bytes=1000,
            heartbeat_seconds=10.0,
        )
        self.fleet, self.sent = FleetConnection(access), []
        self.fleet._node = Node(node_id=NODE)
        self.fleet._client.PushMessages = self._push
        self.fleet._client.PushObject = lambda _request: PushObjectResponse(stored=True)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
        asked = Message(wrap(b"?"), NODE, MESSAGE_TYPE)
        asked.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        self.parcel = Parcel(message=asked, tree=ObjectTree())

    def _push(self, request):
        self.sent.append(request)
        tree = request.message_object_trees[0]
        return PushMessagesResponse(objects_to_push=[one.object_id for one in iterate_object_tree(tree)])

    def reply(self, envelope=b"an answer"):
        self.fleet.send(answer_to(self.parcel.message, envelope))
        return self.sent[-1]

    def error(self):
        self.fleet.send(refusal_of(self.parcel.message, "no " * 1000))
        return self.sent[-1]


@pytest.fixture(scope="module")
def outgoing(tmp_path_factory):
    sending = Outgoing(tmp_path_factory.mktemp("node"))
    yield sending
    sending.fleet._client.close()


def refused(request, store=None):
    with pytest.raises(HTTPException) as refusal:
        require_own_reply(request, store or InMemoryObjectStore())
    return refusal.value.status_code, refusal.value.detail


def test_a_nodes_reply_and_its_refusal_pass_and_so_they_do_when_sent_again(outgoing):
    store = InMemoryObjectStore()
    for request in (outgoing.reply(), outgoing.reply(bytes(2 * PIECE_BYTES + 1)), outgoing.error()):
        require_own_reply(request, store)
        store.preregister(RUN, request.message_object_trees[0])
        require_own_reply(request, store)


def test_the_order_in_which_a_store_gives_the_records_back_does_not_matter(outgoing):
    store, request = InMemoryObjectStore(), outgoing.reply(bytes(2 * PIECE_BYTES + 1))
    store.preregister(RUN, request.message_object_trees[0])
    records = request.message_object_trees[0].children[0].children
    turned = list(reversed(records))
    del records[:]
    records.extend(turned)
    require_own_reply(request, store)


def test_a_reply_that_the_superlink_does_not_want_was_not_delivered(outgoing, monkeypatch):
    """So it says of a second reply to one request, for instance after the first one was cut off half-way."""
    monkeypatch.setattr(outgoing.fleet._client, "PushMessages", lambda _request: PushMessagesResponse())
    with pytest.raises(LinkRefused, match="it does not want this reply; the request was answered, or is over"):
        outgoing.reply()


@pytest.mark.parametrize(("messages", "trees"), [(0, 0), (0, 1), (1, 0), (2, 2), (1, 2), (2, 1)])
def test_exactly_one_message_with_one_tree_is_taken(outgoing, messages, trees):
    sent = outgoing.reply()
    request = PushMessagesRequest(
        node=sent.node,
        messages_list=[sent.messages_list[0]] * messages,
        message_object_trees=[sent.message_object_trees[0]] * trees,
    )
    status, said = refused(request)
    assert status == 400
    assert f"{messages} messages and {trees} object trees" in said


@pytest.mark.parametrize("source", [0, 1, NODE + 1])
def test_a_message_in_another_nodes_name_is_refused(outgoing, source):
    request = outgoing.reply()
    request.messages_list[0].metadata.src_node_id = source
    assert refused(request) == (403, "push-messages: the message is in another node's name")


def test_a_message_that_answers_none_is_refused(outgoing):
    request = outgoing.reply()
    request.messages_list[0].metadata.reply_to_message_id = ""
    assert refused(request)[0] == 403


def nested(depth):
    tree = ObjectTree(object_id="0" * 64)
    for _ in range(depth):
        tree = ObjectTree(object_id="0" * 64, children=[tree])
    return tree


@pytest.mark.parametrize(
    "children",
    [
        [],
        [nested(0)],
        [nested(1)] * 2,
        [nested(2)],
        [nested(90)],
        [nested(1)] * 10_000,
        [ObjectTree(object_id="0" * 64, children=[nested(0)] * (most_pieces(MAX_MESSAGE_BYTES) + 1))],
    ],
    ids=["none", "empty", "wide", "deep", "abyss", "many", "too many records"],
)
def test_other_objects_than_a_reply_has_are_refused(outgoing, children):
    request = outgoing.reply()
    del request.message_object_trees[0].children[:]
    request.message_object_trees[0].children.extend(children)
    assert refused(request)[0] == 400


def test_an_error_brings_no_objects(outgoing):
    request = outgoing.error()
    request.message_object_trees[0].children.append(nested(0))
    status, said = refused(request)
    assert status == 400
    assert "none if it is an error" in said


def test_the_objects_are_the_messages(outgoing):
    request = outgoing.reply()
    request.message_object_trees[0].object_id = "0" * 64
    assert refused(request)[0] == 400


def test_what_belongs_into_objects_is_not_in_the_message(outgoing):
    request = outgoing.error()
    request.messages_list[0].error.reason = "x" * 70_000
    assert refused(request)[0] == 400


def test_a_message_keeps_the_objects_that_it_was_announced_with(outgoing):
    store, request = InMemoryObjectStore(), outgoing.reply()
    store.preregister(RUN, request.message_object_trees[0])
    request.message_object_trees[0].children[0].CopyFrom(nested(1))
    assert refused(request, store) == (403, "push-messages: this message was announced before with other objects")
