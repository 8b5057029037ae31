"""Nodes' questions are held until there is something, never longer, and never for who is gone."""

import asyncio

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from server.held_polls import ANNOUNCE, DELIVER, PULL, HeldPolls
from server.node_identity import NODE_KEY

ENOUGH = 30.0
ALICE, BOB = 11, 22


class House:
    """A SuperLink of which only the doors are there; what came through is in ``asked``."""

    def __init__(self, *, seconds=ENOUGH, status=200):
        self.polls = HeldPolls(seconds)
        self.asked, self._status = [], status
        self._runs, self._nodes = self.polls.noting(self._answer), self.polls.holding(self._answer)

    async def _answer(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.asked.append((scope["path"], body))
        await send({"type": "http.response.start", "status": self._status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def _request(self, application, path, body, *, state=None, gone=None):
        halves = [
            {"type": "http.request", "body": body[:3], "more_body": True},
            {"type": "http.request", "body": body[3:], "more_body": False},
        ]
        sent = []

        async def receive():
            if halves:
                return halves.pop(0)
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await application({"type": "http", "path": path, "state": state or {}}, receive, send)
        return bool(sent)

    async def pull(self, node, *, key=None, gone=None):
        """Whether the node was answered."""
        body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
        return await self._request(self._nodes, PULL, body, state={NODE_KEY: key or b"%d" % node}, gone=gone)

    async def send(self, *nodes, records=1):
        messages = [Message(metadata=Metadata(dst_node_id=node)) for node in nodes]
        body = PushAppMessagesRequest(messages_list=messages).SerializeToString()
        await self._request(self._runs, ANNOUNCE, body)
        for _ in range(records):
            await self._request(self._runs, DELIVER, b"a record")


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, ENOUGH / 2))


def held(question):
    return asyncio.ensure_future(question)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_first_question_passes_and_the_next_is_held_until_a_run_has_sent_this_node_something():
    async def scenario():
        house = House()
        assert await house.pull(ALICE)
        assert await house.pull(BOB)
        alice, bob = held(house.pull(ALICE)), held(house.pull(BOB))
        await settle()
        assert not alice.done()
        await house.send(ALICE)
        assert await alice
        await settle()
        assert not bob.done()
        await house.send(ALICE, BOB)
        assert await bob
        # What was sent while nobody asked is heard of at once.
        assert await house.pull(ALICE)

    run(scenario())


def test_a_message_whose_records_are_there_already_is_heard_of_too():
    async def scenario():
        house = House()
        await house.pull(ALICE)
        question = held(house.pull(ALICE))
        await settle()
        await house.send(ALICE, records=0)
        assert await question

    run(scenario())


def test_a_question_is_held_no_longer_than_said_and_is_answered_then():
    async def scenario():
        house = House(seconds=0.01)
        assert await house.pull(ALICE)
        assert await house.pull(ALICE)
        assert [path for path, _ in house.asked] == [PULL, PULL]

    run(scenario())


def test_who_is_gone_meanwhile_is_given_nothing():
    async def scenario():
        house, gone = House(), asyncio.Event()
        await house.pull(ALICE)
        question = held(house.pull(ALICE, gone=gone))
        await settle()
        gone.set()
        assert not await question
        # Its successor is held in its turn, and finds what is sent then.
        successor = held(house.pull(ALICE))
        await settle()
        await house.send(ALICE)
        assert await successor
        assert [path for path, _ in house.asked].count(PULL) == 2

    run(scenario())


def test_the_application_gets_the_whole_question():
    async def scenario():
        house = House()
        await house.pull(ALICE)
        await house.send(BOB)
        assert PullMessagesRequest.FromString(house.asked[0][1]).node.node_id == ALICE
        assert len(PushAppMessagesRequest.FromString(house.asked[1][1]).messages_list) == 1

    run(scenario())


@pytest.mark.parametrize("path", [PULL, ANNOUNCE, DELIVER])
def test_what_cannot_be_read_is_passed_on(path):
    async def scenario():
        house = House()
        application = house._nodes if path == PULL else house._runs
        assert await house._request(application, path, b"\xff\xff no message", state={NODE_KEY: b"key"})
        assert house.asked == [(path, b"\xff\xff no message")]

    run(scenario())


def test_nothing_is_kept_of_who_may_not_send_nor_of_nodes_that_nobody_has():
    async def scenario():
        refusing = House(status=401)
        await refusing.send(ALICE)
        house = House(seconds=0.001)
        for node in range(100):
            await house.pull(node, key=b"one key")
        for polls in (refusing.polls, house.polls):
            assert not polls._sent
            assert not polls._held
            assert not polls._announced
        assert len(house.polls._seen) == 1

    run(scenario())


def test_flower_still_has_these_paths():
    known = {path for _, path in PROTOBUF_REQUEST_TYPES}
    assert {PULL, ANNOUNCE, DELIVER} <= known
