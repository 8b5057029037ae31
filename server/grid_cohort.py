"""Asks sites over Flower's Grid: bytes out, bytes back, silence after the deadline. Knows nothing of what they say."""

import logging
import queue
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedgrade.errors import MessageRefused, RoundFailed
from fedgrade.federation.messages import MAX_MESSAGE_BYTES
from fedgrade.federation.pieces import MESSAGE_TYPE, cut, join
from fedgrade.trust.identity import SiteId
from server.posting import post_of
from server.replies import Reply, source_of

logger = logging.getLogger(__name__)

_POLL_SHARE: Final = 0.05
# However long a stage takes, a revocation is noticed within this time.
_LONGEST_PAUSE_SECONDS: Final = 1.0
_PUSH_TRIES: Final = 3
# Flower compares a message's age by the node's clock; a partner's clock may be minutes off.
_CLOCK_SLACK_SECONDS: Final = 600.0


def _unwatched(_awaited: Collection[SiteId]) -> None:
    """Where nobody wants to see whom a question waits for."""


class GridCohort:
    """The sites of one run, reached through Flower.

    Attributes:
        nodes: Flower's node id of each site; asked anew all the time, so that a mapping that changes takes effect at
            once: who is no longer in it is neither asked nor awaited, and what it said meanwhile is dropped.
        watch: told about once a second, while a question is open, who has not answered it.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[SiteId, int],
        poll_seconds: float = 0.05,
        max_reply_bytes: int = MAX_MESSAGE_BYTES,
        watch: Callable[[Collection[SiteId]], None] = _unwatched,
    ) -> None:
        self.nodes = nodes
        self.watch = watch
        self._grid = grid
        self._post = post_of(grid)
        self._poll_seconds = poll_seconds
        self._max_reply_bytes = max_reply_bytes

    def ask(self, requests: Mapping[SiteId, bytes], *, deadline_seconds: float) -> Mapping[SiteId, bytes]:
        """Replies of those who answered within ``deadline_seconds``; silence is absence, not an error.

        A site is also absent if its node is unknown or offline, if it sent an error, or if its reply is oversized.
        Replies that come later are never read.

        Raises:
            RoundFailed: ``deadline_seconds`` is not above 0.
        """
        if not deadline_seconds > 0:
            raise RoundFailed(f"deadline of {deadline_seconds} seconds: it must be above 0")
        deadline = time.monotonic() + deadline_seconds
        awaited = self._push(requests, ttl=deadline_seconds + _CLOCK_SLACK_SECONDS)
        replies = self._collect(awaited, deadline)
        envelopes = {site: self._read(site, reply) for site, reply in replies.items()}
        return {site: envelope for site, envelope in envelopes.items() if envelope is not None}

    def _push(self, requests: Mapping[SiteId, bytes], *, ttl: float) -> dict[str, SiteId]:
        """Send ``requests``; which message id awaits which site."""
        nodes = {site: node for site in requests if (node := self.nodes.get(site)) is not None}
        for site in requests.keys() - nodes.keys():
            logger.warning("site %s: no node is known for it, so it is not asked", site)
        if not nodes:
            # Flower answers an empty list with an error of its own.
            return {}
        messages = _messages(requests, nodes, ttl=ttl)
        try:
            accepted = self._post.send(list(messages.values()))
        except ObjectPushError as error:
            # Which of them it was is not said.
            logger.info("messages sent again, one by one (%s)", error)
            accepted = set()
            for site, node in nodes.items():
                messages[site], taken = self._push_one(node, requests[site], ttl=ttl)
                accepted |= taken
        awaited = {message.metadata.message_id: site for site, message in messages.items()}
        for name in awaited.keys() - accepted:
            site = awaited[name]
            logger.warning("site %s: the SuperLink did not take the message for node %d", site, nodes[site])
        return {name: site for name, site in awaited.items() if name in accepted}

    def _push_one(self, node: int, envelope: bytes, *, ttl: float) -> tuple[Message, set[str]]:
        """The message that carries ``envelope`` to ``node``, and its id if it was taken."""
        for _ in range(_PUSH_TRIES):
            message = Message(_content(envelope), node, MESSAGE_TYPE, ttl=ttl)
            try:
                return message, self._post.send([message])
            except ObjectPushError as error:
                # Flower repeats an upload whose answer was lost, and then refuses the bytes because it has them. A
                # new message finds them there; a site that gets both sends the same reply twice.
                logger.info("node %d: message sent again (%s)", node, error)
        return message, set()

    def _collect(self, awaited: Mapping[str, SiteId], deadline: float) -> dict[SiteId, Reply]:
        """Replies by site, as they come, until all are there or the deadline has passed."""
        inbox: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        source = source_of(self._grid)
        began = time.monotonic()
        announced: set[str] = set()
        replies: dict[SiteId, Reply] = {}
        while (missing := set(awaited.values()) - replies.keys()) and (now := time.monotonic()) < deadline:
            self.watch(missing)
            if waiting := awaited.keys() - announced:
                announced |= source.look(waiting, inbox, deadline)
            pause = min(max(self._poll_seconds, _POLL_SHARE * (now - began)), _LONGEST_PAUSE_SECONDS, deadline - now)
            for reply in _drain(inbox, pause, len(missing)):
                if site := awaited.get(reply.request):
                    replies[site] = reply
            awaited = self._still_enrolled(awaited)
        self.watch(set(awaited.values()) - replies.keys())
        for site in awaited.values():
            if site not in replies:
                logger.warning("site %s: no reply before the deadline", site)
        return {site: replies[site] for site in awaited.values() if site in replies}

    def _still_enrolled(self, awaited: Mapping[str, SiteId]) -> dict[str, SiteId]:
        """Those of ``awaited`` whose site was not revoked meanwhile."""
        rest = {message: site for message, site in awaited.items() if site in self.nodes}
        for site in set(awaited.values()) - set(rest.values()):
            logger.warning("site %s: was revoked, and is not awaited", site)
        return rest

    def _read(self, site: SiteId, reply: Reply) -> bytes | None:
        try:
            return _unwrap(reply, self._max_reply_bytes)
        except MessageRefused as error:
            logger.warning("site %s: reply dropped: %s", site, error)
            return None


def _messages(requests: Mapping[SiteId, bytes], nodes: Mapping[SiteId, int], *, ttl: float) -> dict[SiteId, Message]:
    """A message a site; those that say the same share what they carry, which is then hashed and sent once."""
    contents = {envelope: _content(envelope) for envelope in set(requests.values())}
    return {site: Message(contents[requests[site]], node, MESSAGE_TYPE, ttl=ttl) for site, node in nodes.items()}


def _content(envelope: bytes) -> RecordDict:
    return RecordDict({str(place): ConfigRecord(piece) for place, piece in enumerate(cut(envelope))})


def _drain(inbox: "queue.SimpleQueue[Reply]", pause: float, wanted: int) -> Iterator[Reply]:
    """Up to ``wanted`` replies that are there or come within ``pause`` seconds."""
    end = time.monotonic() + pause
    for _ in range(wanted):
        try:
            yield inbox.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            return


def _unwrap(reply: Reply, max_reply_bytes: int) -> bytes:
    """The bytes in ``reply``.

    Raises:
        MessageRefused: it is an error, or anything but the pieces of at most ``max_reply_bytes`` bytes.
    """
    if isinstance(reply.content, str):
        raise MessageRefused(reply.content)
    return join(reply.content, max_bytes=max_reply_bytes)
