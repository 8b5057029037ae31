"""Asks sites over Flower's Grid: bytes out, bytes back, silence after the deadline. Knows nothing of what they say.

Each awaited reply has a thread of its own, because Flower's ``pull_messages`` returns only when every object of every
reply it found has arrived: one node that announces a reply and never sends it would hold up all the others.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import http_grid

from fedgrade.errors import MessageRefused, RoundFailed
from fedgrade.trust.identity import SiteId

logger = logging.getLogger(__name__)

# The same three names as in clients/wire.py; a test holds them together.
MESSAGE_TYPE: Final = "query.fedgrade"
RECORD: Final = "fedgrade"
FIELD: Final = "envelope"
MAX_REPLY_BYTES: Final = 256 * 1024 * 1024

_POLL_SHARE: Final = 0.05
# Flower compares a message's age by the node's clock; a partner's clock may be minutes off.
_CLOCK_SLACK_SECONDS: Final = 600.0


class GridCohort:
    """The sites of one run, reached through Flower.

    Attributes:
        nodes: Flower's node id of each site.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[SiteId, int],
        poll_seconds: float = 0.05,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        self.nodes = dict(nodes)
        self._grid = grid
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
        with _prompt_object_pulls(deadline):
            awaited = self._push(requests, ttl=deadline_seconds + _CLOCK_SLACK_SECONDS)
            replies = self._collect(awaited, deadline)
        envelopes = {site: self._read(site, reply) for site, reply in replies.items()}
        return {site: envelope for site, envelope in envelopes.items() if envelope is not None}

    def _push(self, requests: Mapping[SiteId, bytes], *, ttl: float) -> dict[str, SiteId]:
        """Send ``requests``; which message id awaits which site."""
        messages = {}
        for site, envelope in requests.items():
            if site not in self.nodes:
                logger.warning("site %s: no node is known for it, so it is not asked", site)
                continue
            content = RecordDict({RECORD: ConfigRecord({FIELD: envelope})})
            messages[site] = Message(content, self.nodes[site], MESSAGE_TYPE, ttl=ttl)
        accepted = set(self._grid.push_messages(list(messages.values()))) if messages else set()
        awaited = {}
        for site, message in messages.items():
            if message.metadata.message_id in accepted:
                awaited[message.metadata.message_id] = site
            else:
                logger.warning("site %s: the SuperLink did not take the message for node %d", site, self.nodes[site])
        return awaited

    def _collect(self, awaited: Mapping[str, SiteId], deadline: float) -> dict[SiteId, Message]:
        inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        for message_id in awaited:
            # Daemons: a pull that Flower retries for ever must not keep the run's process alive.
            threading.Thread(target=self._listen, args=(message_id, inbox, deadline), daemon=True).start()
        replies: dict[SiteId, Message] = {}
        while len(replies) < len(awaited):
            try:
                reply = inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            replies[awaited[reply.metadata.reply_to_message_id]] = reply
        for site in awaited.values():
            if site not in replies:
                logger.warning("site %s: no reply before the deadline", site)
        return replies

    def _listen(self, message_id: str, inbox: "queue.SimpleQueue[Message]", deadline: float) -> None:
        """Put the reply to ``message_id`` into ``inbox``, or nothing after ``deadline``."""
        began = time.monotonic()
        while (now := time.monotonic()) < deadline:
            try:
                replies = list(self._grid.pull_messages([message_id]))
            except Exception:
                # The thread's last door: whatever Flower raises, this site is absent and the others are not.
                logger.exception("reply to message %s could not be pulled", message_id[:16])
                return
            for reply in replies:
                if reply.metadata.reply_to_message_id == message_id:
                    inbox.put(reply)
                    return
            time.sleep(min(max(self._poll_seconds, _POLL_SHARE * (now - began)), max(0.0, deadline - now)))

    def _read(self, site: SiteId, reply: Message) -> bytes | None:
        if reply.has_error():
            logger.warning("site %s: Flower error %d: %.300s", site, reply.error.code, reply.error.reason)
            return None
        try:
            return _unwrap(reply.content, self._max_reply_bytes)
        except MessageRefused as error:
            logger.warning("site %s: reply dropped: %s", site, error)
            return None


def _unwrap(content: RecordDict, max_reply_bytes: int) -> bytes:
    """The bytes in ``content``.

    Raises:
        MessageRefused: it is anything but one record with one field of at most ``max_reply_bytes`` bytes.
    """
    record = content.get(RECORD)
    envelope = record.get(FIELD) if isinstance(record, ConfigRecord) and len(record) == 1 else None
    if len(content) != 1 or not isinstance(envelope, bytes):
        raise MessageRefused(f"expected one ConfigRecord {RECORD!r} with one field {FIELD!r} of bytes")
    if len(envelope) > max_reply_bytes:
        raise MessageRefused(f"{len(envelope)} bytes, at most {max_reply_bytes} are read")
    return envelope


@contextmanager
def _prompt_object_pulls(deadline: float) -> Iterator[None]:
    """Until it ends, ``HttpGrid`` looks for objects still on their way every 0.03 to 0.2 s, and until ``deadline``.

    flwr's own back-off is 1 s doubling to 10 s and its patience two hours; it offers no setting, and its
    ``pull_messages`` looks the function up in its module, which is the least that can be changed.
    """
    original = http_grid.pull_objects

    def prompt(*arguments: Any, **settings: Any) -> dict[str, bytes]:
        left = max(0.1, deadline - time.monotonic())
        hurried = {**settings, "initial_backoff": 0.03, "backoff_cap": 0.2, "max_time": left}
        pulled: dict[str, bytes] = original(*arguments, **hurried)
        return pulled

    http_grid.pull_objects = prompt
    try:
        yield
    finally:
        http_grid.pull_objects = original
