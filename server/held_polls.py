"""A node that asks whether there is a message for it is answered when there is one, or after a second.

Flower's nodes ask, are told that there is nothing, and wait before they ask again: a round costs that wait. Here the
question waits, in the SuperLink, until a run has sent this node something since it asked last. Nothing is decided by
that: whoever is let through asks Flower, which has the last word on whose message it is.
"""

import asyncio
from collections import Counter
from collections.abc import MutableMapping
from typing import Any, Final

from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from server.metrics import Application, Receive, Scope, Send
from server.node_identity import NODE_KEY

PULL: Final = "/v1/fleet/pull-messages"
ANNOUNCE: Final = "/v1/runtime/push-messages"
DELIVER: Final = "/v1/runtime/push-object"
HOLD_SECONDS: Final = 1.0
# The first record follows this soon on the message that announces it, or the SuperLink has all of them already.
_RECORDS_SECONDS: Final = 0.05
_TAKEN: Final = 200


class HeldPolls:
    """Holds nodes' questions, and lets a node's go when a run has sent it a message.

    Args:
        seconds: a question is held for at most this long; a node that is to stop stops no sooner.
    """

    def __init__(self, seconds: float = HOLD_SECONDS) -> None:
        self._seconds = seconds
        self._announced: set[int] = set()
        self._sent: Counter[int] = Counter()
        self._seen: dict[bytes, int] = {}
        self._held: dict[int, set[asyncio.Future[None]]] = {}

    def noting(self, application: Application) -> Application:
        """``application``, through which runs send; whom they have sent something is noted when it is there."""

        async def noted(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope["path"] if scope["type"] == "http" else ""
            statuses: list[int | None] = []

            async def answer(message: Scope) -> None:
                statuses.append(message.get("status"))
                await send(message)

            if path == ANNOUNCE:
                body, receive = await _body(receive)
            await application(scope, receive, answer if path in {ANNOUNCE, DELIVER} else send)
            if statuses[:1] != [_TAKEN]:
                # Who may not send is not listened to.
                return
            if path == ANNOUNCE:
                self._announced |= _receivers(body)
                asyncio.get_running_loop().call_later(_RECORDS_SECONDS, self._note)
            else:
                self._note()

        return noted

    def holding(self, application: Application) -> Application:
        """``application``, which nodes ask; a question in the name of an enrolled key may be held."""

        async def held(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == PULL:
                body, again = await _body(receive)
                node, key = _asker(body), scope["state"][NODE_KEY]
                if self._seen.get(key) == self._sent[node] and not await self._until_sent(node, receive):
                    return
                receive = again
                # Before Flower is asked: what is sent meanwhile is news to the next question.
                self._seen[key] = self._sent[node]
            await application(scope, receive, send)

        return held

    def _note(self) -> None:
        for node in self._announced:
            self._sent[node] += 1
            for waiting in self._held.get(node, ()):
                if not waiting.done():
                    waiting.set_result(None)
        self._announced = set()

    async def _until_sent(self, node: int, receive: Receive) -> bool:
        """Wait for something to be sent to ``node``, or the time to be over; whether it is still there.

        Who is gone must not be given a message: Flower hands each out once.
        """
        sent = asyncio.get_running_loop().create_future()
        gone = asyncio.ensure_future(receive())
        self._held.setdefault(node, set()).add(sent)
        try:
            await asyncio.wait({sent, gone}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            return not (gone.done() and gone.result()["type"] == "http.disconnect")
        finally:
            gone.cancel()
            self._held[node].discard(sent)
            if not self._held[node]:
                del self._held[node]


async def _body(receive: Receive) -> tuple[bytes, Receive]:
    """The request's body, and a ``receive`` that gives it again."""
    messages: list[MutableMapping[str, Any]] = []
    while not messages or (messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False)):
        messages.append(await receive())
    given = iter(messages)

    async def give() -> MutableMapping[str, Any]:
        for message in given:
            return message
        return await receive()

    return b"".join(message.get("body", b"") for message in messages), give


def _receivers(body: bytes) -> set[int]:
    """Nodes for which a run announces messages; of what cannot be read, none: Flower refuses it."""
    try:
        return {message.metadata.dst_node_id for message in PushAppMessagesRequest.FromString(body).messages_list}
    except DecodeError:
        return set()


def _asker(body: bytes) -> int:
    """The node in whose name a question is asked; 0 if it cannot be read, which Flower refuses."""
    try:
        return int(PullMessagesRequest.FromString(body).node.node_id)
    except DecodeError:
        return 0
