"""Of a message the SuperLink asks for its records alone, loses none of them for that, and says whether it took it."""

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import (
    NOOP_FEDERATION_ID,
    OBJECT_PUSH_SESSION_TTL_SECONDS,
    TaskType,
)
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from flwr.supercore.object_store import in_memory_object_store
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from clients.wire import wrap
from fedgrade.federation.pieces import MESSAGE_TYPE, PIECE_BYTES
from server import flower_state
from server.flower_state import LeafState, LeafStore

PATIENCE = 30.0
OURS, STOCK = (LeafState, LeafStore), (InMemoryLinkState, InMemoryObjectStore)


class House:
    """A state with one run and two nodes."""

    def __init__(self, monkeypatch, kinds=OURS):
        state, store = kinds
        self.store = store()
        self.state = state(NoOpFederationManager(simulation=False), self.store)
        self.run = self.state.create_run(
            None, None, "f" * 64, {}, NOOP_FEDERATION_ID, None, None, primary_task_type=TaskType.SERVER_APP
        )
        self.nodes = [self.state.create_node("us", "us", bytes([one]), 60.0) for one in range(2)]
        for node in self.nodes:
            self.state.activate_node(node, 60.0)
        for name, value in {"_run_id": self.run, "_node_id": SUPERLINK_NODE_ID, "_task_id": 1}.items():
            monkeypatch.setattr(TaskIdentity, name, value)
        self._monkeypatch = monkeypatch

    def request(self, node, content):
        return named(Message(content, node, MESSAGE_TYPE, ttl=3600.0))

    def reply(self, request, node, content):
        self._monkeypatch.setattr(TaskIdentity, "_node_id", node)
        return named(Message(content, reply_to=request))

    def announce(self, *messages):
        """The push that begins: its name, which messages were taken, and what is asked for of each."""
        session = self.state.start_session(self.run)
        found = [self.state.store_message_and_object_tree(one, get_object_tree(one), session) for one in messages]
        return SimpleNamespace(
            session=session, taken=[taken for taken, _ in found], wanted=[set(names) for _, names in found]
        )

    def send(self, session, items):
        return [self.state.store_object(self.run, session, one.object_id, one.deflate()) for one in items]


def named(message):
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def records(message):
    return list(message.content.values())


def names(items):
    return {one.object_id for one in items}


@pytest.fixture
def house(monkeypatch):
    return House(monkeypatch)


def test_records_alone_are_asked_for_those_that_messages_share_for_each_of_them(house):
    content = wrap(bytes(PIECE_BYTES + 1))
    messages = [house.request(node, content) for node in house.nodes]
    push = house.announce(*messages)
    assert push.taken == [True, True]
    assert push.wanted == [names(records(one)) | {one.object_id} for one in messages]
    assert house.send(push.session, records(messages[0])) == [True, True]
    # And nothing more: the push is over.
    assert house.send(push.session, messages) == [False, False]
    assert not house.state._object_push_sessions


@pytest.mark.parametrize(("kinds", "kept"), [(OURS, True), (STOCK, False)])
def test_what_never_comes_takes_nothing_with_it(monkeypatch, kinds, kept):
    """Flower as it is throws everything away: why it has to be told what never comes."""
    house = House(monkeypatch, kinds)
    message = house.request(house.nodes[0], wrap(b"an envelope"))
    house.send(house.announce(message).session, records(message))
    later = in_memory_corestate.now() + timedelta(seconds=OBJECT_PUSH_SESSION_TTL_SECONDS + 1)
    monkeypatch.setattr(in_memory_corestate, "now", lambda: later)
    house.state.get_object(house.run, message.object_id)
    (record,) = records(message)
    assert bool(house.state.get_object(house.run, record.object_id)) == kept
    assert (message.object_id in house.state.message_ins_store) == kept


def test_a_record_that_never_comes_ends_its_push_as_it_does_in_flower(house, monkeypatch):
    message = house.request(house.nodes[0], wrap(b"an envelope"))
    house.announce(message)
    later = in_memory_corestate.now() + timedelta(seconds=OBJECT_PUSH_SESSION_TTL_SECONDS + 1)
    monkeypatch.setattr(in_memory_corestate, "now", lambda: later)
    (record,) = records(message)
    assert house.state.get_object(house.run, record.object_id) is None
    assert message.object_id not in house.state.message_ins_store


def test_a_second_reply_is_not_taken_and_one_whose_records_are_all_there_is(house):
    requests = [house.request(node, wrap(b"question")) for node in house.nodes]
    push = house.announce(*requests)
    house.send(push.session, records(requests[0]))
    first, other = (
        house.reply(request, node, wrap(b"answer")) for request, node in zip(requests, house.nodes, strict=True)
    )
    push = house.announce(first)
    assert push.wanted == [names(records(first)) | {first.object_id}]
    assert house.send(push.session, records(first)) == [True]
    # The same words from elsewhere: nothing is to be sent, and it was taken.
    assert house.announce(other).wanted == [{other.object_id}]
    again = house.announce(house.reply(requests[0], house.nodes[0], wrap(b"another answer")))
    assert again.taken == [False]
    assert again.wanted == [set()]


@pytest.mark.parametrize("kinds", [OURS, STOCK], ids=["ours", "Flower's"])
def test_a_reply_counts_also_where_its_node_went_offline_before_anybody_looked(monkeypatch, kinds):
    house = House(monkeypatch, kinds)
    answered, silent = (house.request(node, wrap(b"?")) for node in house.nodes)
    began = house.announce(answered, silent)
    house.send(began.session, [*answered.content.values(), *silent.content.values()])
    reply = house.reply(answered, house.nodes[0], wrap(b"!"))
    house.send(house.announce(reply).session, reply.content.values())
    for node in house.nodes:
        house.state.deactivate_node(node)
    monkeypatch.setattr(TaskIdentity, "_node_id", SUPERLINK_NODE_ID)
    found = {
        each.metadata.reply_to_message_id: each
        for each in house.state.get_message_res({answered.object_id, silent.object_id}, house.run)
    }
    assert found[silent.object_id].has_error()
    # The day that Flower does so itself, ours can go.
    assert found[answered.object_id].has_error() == (kinds == STOCK)
    # Once is enough, and nobody is online for having answered.
    assert kinds == STOCK or house.state.get_message_res({answered.object_id}, house.run) == []
    assert all(house.state.nodes[node].online_until <= time.time() for node in house.nodes)


def test_a_reply_that_will_never_be_whole_does_not_count_where_its_node_went_offline(house, monkeypatch):
    request = house.request(house.nodes[0], wrap(b"?"))
    house.send(house.announce(request).session, request.content.values())
    house.announce(house.reply(request, house.nodes[0], wrap(b"!")))
    house.state.deactivate_node(house.nodes[0])
    monkeypatch.setattr(TaskIdentity, "_node_id", SUPERLINK_NODE_ID)
    (found,) = house.state.get_message_res({request.object_id}, house.run)
    assert found.has_error()


def test_a_message_without_records_is_sent_itself(house):
    request = house.request(house.nodes[0], wrap(b"question"))
    house.announce(request)
    error = house.reply(request, house.nodes[0], Error(2, "no"))
    push = house.announce(error)
    assert push.wanted == [{error.object_id}]
    assert house.send(push.session, [error]) == [True]
    assert house.state.get_object(house.run, error.object_id) == error.deflate()


def test_a_push_in_which_nothing_is_to_be_sent_is_forgotten_in_time(house, monkeypatch):
    content = wrap(b"the same for both")
    first, other = (house.request(node, content) for node in house.nodes)
    house.send(house.announce(first).session, records(first))
    house.announce(other)
    open_one = house.announce(house.request(house.nodes[0], wrap(b"on its way"))).session
    assert len(house.state._object_push_sessions) == 2
    later = in_memory_corestate.now() + timedelta(seconds=OBJECT_PUSH_SESSION_TTL_SECONDS + 1)
    monkeypatch.setattr(flower_state, "now", lambda: later)
    new = house.state.start_session(house.run)
    assert set(house.state._object_push_sessions) == {open_one, new}


def test_what_a_request_carried_is_forgotten_with_it_and_not_what_others_carry_too(house):
    """Such as one to a node that is offline, for which Flower makes an answer of its own."""
    content = wrap(b"the same for both")
    first, other = (house.request(node, content) for node in house.nodes)
    house.send(house.announce(first, other).session, records(first))
    house.state.nodes[house.nodes[0]].online_until = 0.0
    (answer,) = house.state.get_message_res({first.object_id}, house.run)
    assert answer.has_error()
    house.state.delete_messages({first.object_id})
    assert first.object_id not in house.store
    (record,) = records(first)
    assert house.state.get_object(house.run, record.object_id) == record.deflate()
    house.state.delete_messages({other.object_id})
    assert record.object_id not in house.store


def test_a_push_that_is_out_of_time_and_one_that_begins_do_not_wait_for_each_other(house, monkeypatch):
    """The one takes Flower's lock of pushes first and that of messages second; so must the other."""
    old, new = (house.request(node, wrap(b"%d" % node)) for node in house.nodes)
    house.announce(old)
    later = in_memory_corestate.now() + timedelta(seconds=OBJECT_PUSH_SESSION_TTL_SECONDS + 1)
    monkeypatch.setattr(in_memory_corestate, "now", lambda: later)
    (record,) = records(old)
    delete, begun, announced = house.store.delete, threading.Event(), []
    session = house.state.start_session(house.run)

    def announce():
        begun.set()
        announced.append(house.state.store_message_and_object_tree(new, get_object_tree(new), session))

    beside = threading.Thread(target=announce, daemon=True)

    def delete_while_another_begins(name):
        # The lock of pushes is held here, and that of messages is taken next.
        if not begun.is_set():
            beside.start()
            begun.wait()
            time.sleep(0.2)
        delete(name)

    monkeypatch.setattr(house.store, "delete", delete_while_another_begins)
    ending = threading.Thread(target=lambda: house.state.get_object(house.run, record.object_id), daemon=True)
    ending.start()
    for thread in (ending, beside):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert announced[0][0]


def test_what_two_messages_share_is_not_forgotten_with_one_while_the_other_is_announced(house, monkeypatch):
    first, again = (house.request(house.nodes[0], wrap(b"the same question")) for _ in range(2))
    house.send(house.announce(first).session, records(first))
    valid, forgetting = in_memory_object_store.is_valid_sha256_hash, []

    def forget_before_the_dictionary(name):
        if name == again.content.object_id:
            forgetting.append(threading.Thread(target=lambda: house.store.delete(first.object_id), daemon=True))
            forgetting[0].start()
            forgetting[0].join(0.2)
        return valid(name)

    monkeypatch.setattr(in_memory_object_store, "is_valid_sha256_hash", forget_before_the_dictionary)
    assert house.announce(again).taken == [True]
    forgetting[0].join(PATIENCE)
    (record,) = records(again)
    assert house.state.get_object(house.run, record.object_id) == record.deflate()


def test_what_was_received_is_forgotten_with_all_that_it_held(house):
    message = house.request(house.nodes[0], wrap(bytes(2 * PIECE_BYTES + 1)))
    house.send(house.announce(message).session, records(message))
    tree = house.store.get_object_tree(message.object_id)
    assert len([one.object_id for one in iterate_object_tree(tree)]) == len(house.store) == 5
    house.store.delete(message.object_id)
    assert len(house.store) == 0
