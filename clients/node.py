"""The resident node: takes a message from the SuperLink, hands its bytes to ``answer``, sends the reply back.

One process for the life of the site. It never fetches or runs an app bundle, whatever the coordinator submits, and it
outlives the SuperLink: every failure of the link is a pause with a growing back-off, never the end of the process.
"""

import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from clients.fleet import FleetAccess, FleetConnection, LinkDown, LinkRefused, Parcel
from clients.gate import Answer, untold
from clients.link import LinkSource, NodeLink, Standing
from clients.outgoing import Outgoing, answer_to, refusal_of
from fedgrade.errors import DocumentRefused, FedgradeError, MessageRefused
from fedgrade.memory import keep_large_buffers

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# The wait between polls is a twentieth of the quiet so far: a round is delayed by 5 % at most, an idle site is silent.
_POLL_SHARE: Final = 0.05
_FIRST_RETRY_SECONDS: Final = 0.25
_AWAY_SECONDS: Final = 1.0
_TELL_AGAIN_SECONDS: Final = 600.0
_NUMBER: Final = re.compile(r"[0-9]+")
_REPLY_PATIENCE_SECONDS: Final = 120.0
_NODE_ID_BITS: Final = 64
_MAX_SESSION_CHARACTERS: Final = 8192
_SESSION: Final = re.compile(r"(?P<node>[1-9][0-9]{0,19}) (?P<here>[^\n]+)\n")


class LinkPhase(StrEnum):
    """Where the node stands with its SuperLink."""

    CONNECTING = "connecting"
    ONLINE = "online"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True)
class LinkState:
    """A phase, and one line for the operator."""

    phase: LinkPhase
    detail: str


OnState = Callable[[LinkState], None]
_AnswerOne = Callable[[FleetConnection, Parcel], None]


def log_state(state: LinkState) -> None:
    """Tell the operator's log that the link changed."""
    logger.info("link %s: %s", state.phase, state.detail)


def serve(
    source: LinkSource,
    answer: Answer,
    *,
    stop: threading.Event,
    on_state: OnState = log_state,
    on_delivered: Callable[[bytes], None] = untold,
) -> None:
    """Answer the SuperLink's messages until ``stop`` is set; this process keeps large buffers from then on.

    Args:
        source: where and as whom; where it changes, or a file that it names, the node signs on anew.
        answer: from request bytes to reply bytes; if it raises, the sender gets one line and no reply.
        stop: ends the loop within about a second, or when the answer under way has been sent.
        on_state: called when the phase or its detail changes, from this thread.
        on_delivered: called with a request whose reply the SuperLink has taken, from this thread.

    Raises:
        DocumentRefused: key or certificate cannot be read; nothing is retried, since nobody would come to mend it.
    """
    keep_large_buffers()
    standing = Standing(source)
    access = standing.access()
    # httpx writes a line for each request at INFO: twenty a second while a run is on.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    tell = _OnChange(on_state)
    answer_one = partial(_answer_one, answer=answer, stop=stop, on_delivered=on_delivered)
    delay = _FIRST_RETRY_SECONDS
    while not stop.is_set():
        tell(LinkPhase.CONNECTING, access.address)
        began = time.monotonic()
        try:
            access = standing.access()
            _one_connection(standing, access, answer_one, stop, tell)
        except LinkDown as error:
            tell(LinkPhase.UNREACHABLE, str(error))
        except (LinkRefused, DocumentRefused) as error:
            # Also what a node meets that came back too soon: its predecessor is still held for online.
            tell(LinkPhase.REFUSED, str(error))
            standing.try_other_key()
        except Exception:
            # The node's last door: whatever a SuperLink or flwr comes up with, the site stays up for its operator.
            logger.exception("link failed")
            tell(LinkPhase.REFUSED, "unexpected failure; the log has the trace")
        if standing.changed or time.monotonic() - began > standing.link.retry_cap_seconds:
            delay = _FIRST_RETRY_SECONDS
        stop.wait(delay)
        delay = min(2 * delay, standing.link.retry_cap_seconds)
    tell(LinkPhase.STOPPED, access.address)


class _OnChange:
    """Calls ``on_state`` when the state is another one; a failure that lasts is told again after some minutes.

    CONNECTING is told once, not at every retry. A failure whose reason in brackets differs in numbers alone is the
    same: a SuperLink says by how many seconds a clock is off, and what time it is, others at each retry.
    """

    def __init__(self, on_state: OnState, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_state = on_state
        self._clock = clock
        self._last: tuple[LinkPhase, str] | None = None
        self._told_at = 0.0

    def __call__(self, phase: LinkPhase, detail: str) -> None:
        now, failed = self._clock(), phase in {LinkPhase.UNREACHABLE, LinkPhase.REFUSED}
        what, bracket, reason = detail.partition("(")
        state = phase, what + bracket + (_NUMBER.sub("", reason) if failed else reason)
        retrying = phase is LinkPhase.CONNECTING and self._last is not None and self._last[0] is not LinkPhase.ONLINE
        lasting = state == self._last and not (failed and now - self._told_at >= _TELL_AGAIN_SECONDS)
        if not (lasting or retrying):
            self._last, self._told_at = state, now
            self._on_state(LinkState(phase=phase, detail=detail))


def _one_connection(
    standing: Standing, access: FleetAccess, answer_one: _AnswerOne, stop: threading.Event, tell: _OnChange
) -> None:
    """Serve until the link fails or is another one, or ``stop`` is set."""
    link = standing.link
    connection = FleetConnection(access)
    lost = threading.Event()
    heart = threading.Thread(target=_beat, args=(connection, link, lost), name="fleet-heartbeat", daemon=True)
    try:
        word = f"node {_sign_on(connection, link)} at {link.address}"
        tell(LinkPhase.ONLINE, word)
        standing.signed_on()
        heart.start()
        while not (stop.is_set() or lost.is_set() or standing.changed):
            try:
                _poll(
                    connection,
                    link,
                    answer_one,
                    over=lambda: stop.is_set() or lost.is_set() or standing.changed,
                    stop=stop,
                    on_contact=lambda: tell(LinkPhase.ONLINE, word),
                )
            except LinkDown as error:
                # Not a reason to sign on anew: a SuperLink that comes back still holds this node for online, and
                # refuses whoever signs on in its name until the heartbeat has been missing for a while.
                tell(LinkPhase.UNREACHABLE, str(error))
                stop.wait(_AWAY_SECONDS)
    finally:
        lost.set()
        if heart.ident is not None:
            heart.join(timeout=1.0)
        connection.close()


def _sign_on(connection: FleetConnection, link: NodeLink) -> int:
    """The node's id, online. After a crash it goes on as the node that the SuperLink still holds for online.

    Otherwise a successor is refused for as long as a heartbeat may be missing, and a round may be over by then.
    """
    session = link.node_key.with_name(link.node_key.name + ".session")
    # A copy of the folder, here or elsewhere, must not go on beside the site that it was copied from.
    here = f"{socket.gethostname()} {link.node_key.resolve()}"
    try:
        node = connection.activate()
    except LinkRefused:
        found = _SESSION.fullmatch(_read_session(session))
        if found is None or found["here"] != here or int(found["node"]) >= 1 << _NODE_ID_BITS:
            raise
        return connection.go_on(int(found["node"]))
    try:
        session.write_text(f"{node} {here}\n")
    except OSError as error:
        logger.warning("%s: %s; after a crash this node will have to wait", session, error.strerror)
    return node


def _read_session(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(_MAX_SESSION_CHARACTERS)
    except OSError:
        return ""


def _beat(connection: FleetConnection, link: NodeLink, lost: threading.Event) -> None:
    """Heartbeats until ``lost``; sets it when the SuperLink no longer knows the node."""
    while not lost.wait(0.7 * link.heartbeat_seconds):
        try:
            connection.heartbeat()
        except LinkDown as error:
            logger.debug("heartbeat: %s", error)
        except FedgradeError as error:
            logger.warning("heartbeat: %s", error)
            lost.set()


def _poll(
    connection: FleetConnection,
    link: NodeLink,
    answer_one: _AnswerOne,
    *,
    over: Callable[[], bool],
    stop: threading.Event,
    on_contact: Callable[[], None],
) -> None:
    """Answer one message after the other; polls fast after the last one, then ever more slowly."""
    last = time.monotonic() - link.idle_poll_seconds / _POLL_SHARE
    while not over():
        try:
            parcel = connection.receive()
        except MessageRefused as error:
            logger.warning("message dropped: %s", error)
            parcel = None
        on_contact()
        if parcel is not None:
            answer_one(connection, parcel)
            last = time.monotonic()
            continue
        quiet = time.monotonic() - last
        stop.wait(min(link.idle_poll_seconds, max(link.busy_poll_seconds, _POLL_SHARE * quiet)))


def _answer_one(
    connection: FleetConnection,
    parcel: Parcel,
    *,
    answer: Answer,
    stop: threading.Event,
    on_delivered: Callable[[bytes], None],
) -> None:
    """Fetch, answer, send, let the SuperLink forget. A failure ends this message and not the node."""
    try:
        request = _patiently(lambda: connection.fetch(parcel), stop)
        reply = answer(request)
    except LinkRefused as error:
        logger.warning("run %d: message left unanswered: %s", parcel.run_id, error)
        return
    except LinkDown:
        raise
    except MessageRefused as error:
        reason = str(error)
        logger.warning("run %d: message refused: %s", parcel.run_id, reason)
        _send(connection, parcel, refusal_of(parcel.message, reason), stop)
        return
    except Exception:
        # The last door of the site: the operator reads the trace here, the coordinator learns nothing from it.
        logger.exception("run %d: the site could not answer", parcel.run_id)
        reason = "the site could not answer; its operator has the reason"
        _send(connection, parcel, refusal_of(parcel.message, reason), stop)
        return
    _send(connection, parcel, answer_to(parcel.message, reply), stop, on_sent=lambda: on_delivered(request))


def _send(
    connection: FleetConnection,
    parcel: Parcel,
    outgoing: Outgoing,
    stop: threading.Event,
    *,
    on_sent: Callable[[], None] | None = None,
) -> None:
    try:
        _patiently(lambda: connection.send(outgoing), stop)
        if on_sent is not None:
            on_sent()
        # Last, because nobody waits for it.
        _patiently(lambda: connection.confirm(parcel), stop)
    except LinkRefused as error:
        logger.warning("run %d: reply not taken: %s", parcel.run_id, error)


def _patiently(operation: Callable[[], Result], stop: threading.Event) -> Result:
    """``operation()``, tried again while the SuperLink restarts, since it hands out a message only once."""
    deadline = time.monotonic() + _REPLY_PATIENCE_SECONDS
    delay = _FIRST_RETRY_SECONDS
    while True:
        try:
            return operation()
        except LinkDown:
            if time.monotonic() > deadline or stop.wait(delay):
                raise
            delay = min(2 * delay, 5.0)
