"""The site's door on its own machine: gRPC on a Unix socket that only the site's user may open.

The operator's commands (status, pause, resume, drain) come through it, and so do requests from a stock Flower
ClientApp, which thereby gets replies without keys or photos within its reach. Folder 0700, socket 0600, and the
kernel's word for who connects (clients/own_user.py): whoever gets in is the site's user, and asked nothing more.
"""

import logging
import os
import socket
import stat
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import grpc

from clients.agent_pb2 import AnswerReply, AnswerRequest, Budget, LeaveRequest, Nothing, SiteStatus
from clients.agent_pb2_grpc import AgentServicer, AgentStub, add_AgentServicer_to_server
from clients.gate import Gate, Mode, SiteClosed, untold
from clients.own_user import OwnUserDoor
from fedgrade.errors import DocumentRefused, FedgradeError
from fedgrade.federation.activity import AccountStanding, Activity

logger = logging.getLogger(__name__)

MAX_ENVELOPE_BYTES: Final = 256 * 1024 * 1024
_OPTIONS: Final = [
    ("grpc.max_receive_message_length", MAX_ENVELOPE_BYTES + 1024),
    ("grpc.max_send_message_length", MAX_ENVELOPE_BYTES + 1024),
]
_MAX_SOCKET_PATH_BYTES: Final = 100  # sun_path holds 108 on Linux and 104 on macOS, with its end
_OTHERS: Final = 0o077
_INNER: Final = "in"  # folder of gRPC's own socket, closed to others even where somebody opens the one above
_STATUS_SECONDS: Final = 5.0
_NOTHING: Final = Nothing()


class LeaveRefused(FedgradeError):
    """The site cannot leave just now: answers that it charged for have not reached the coordinator."""


class AgentUnavailable(FedgradeError):
    """The site's process does not listen, is paused or draining, or did not answer in time."""


@dataclass(frozen=True, kw_only=True)
class AgentStatus:
    """What the site's process says of itself.

    Attributes:
        mode: what its operator last asked for.
        answering: whether a request is being answered now.
        answered: requests since the process began.
        link: the node's connection in words; empty without one.
        activity: the job asked about last, where in it, and the last refusal.
        budgets: each account's cohort, side, epsilon spent and ceiling.
        undelivered: answers that were charged for and not seen to leave.
    """

    mode: Mode
    answering: bool
    answered: int
    link: str
    activity: Activity
    budgets: tuple[tuple[str, str, float, float], ...]
    undelivered: int


@dataclass(frozen=True, kw_only=True)
class Words:
    """Who tells a site's operator how it stands: the connection, what it is at, what is spent, what undelivered."""

    link: Callable[[], str] = str
    activity: Callable[[], Activity] = Activity
    standings: Callable[[], tuple[AccountStanding, ...]] = tuple
    undelivered: Callable[[], int] = int


class AgentServer:
    """Serves ``gate`` on the socket at ``path``; a context manager.

    Args:
        gate: stands before the site's ``answer``.
        path: of the socket; its folder is created with mode 0700, or must have it.
        words: for the operator's status.
        on_delivered: called with a request that came through this socket when its reply is handed over.
    """

    def __init__(
        self, gate: Gate, path: Path, *, words: Words = Words(), on_delivered: Callable[[bytes], None] = untold
    ) -> None:
        self._path = path
        self._inner = path.parent / _INNER / path.name
        self._door = OwnUserDoor(path, self._inner)
        # One answer at a time passes the gate; the other threads are for status and pause meanwhile.
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), options=_OPTIONS)
        add_AgentServicer_to_server(_Servicer(gate, words, on_delivered), self._server)

    def __enter__(self) -> Self:
        """Listen.

        Raises:
            DocumentRefused: another process listens there, the path is too long, or others may enter its folder.
        """
        inner = self._inner
        _claim(self._path)
        _claim(inner)
        try:
            self._server.add_insecure_port(f"unix:{inner}")
        except RuntimeError as error:
            raise DocumentRefused(f"socket {inner}: cannot be opened ({error})") from error
        # The folder already keeps others out while the socket has the mode that the umask gave it.
        inner.chmod(0o600)
        # First the door: whoever is early waits for gRPC, and a door that cannot be had leaves no server behind.
        self._door.__enter__()
        self._server.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stop listening; an answer under way gets two seconds to leave."""
        self._server.stop(grace=2.0).wait()
        self._door.__exit__()
        self._inner.unlink(missing_ok=True)


class AgentClient:
    """Talks to the site's process behind the socket at ``path``; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel = grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)
        self._stub = AgentStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._channel.close()

    def answer(self, envelope: bytes, *, timeout_seconds: float | None = None) -> bytes:
        """The site's reply to ``envelope``.

        Raises:
            DocumentRefused: ``envelope`` is over 256 MiB.
            AgentUnavailable: nobody listens, the site is closed, or the time is up.
        """
        if len(envelope) > MAX_ENVELOPE_BYTES:
            raise DocumentRefused(f"envelope of {len(envelope)} bytes: at most {MAX_ENVELOPE_BYTES} are sent")
        reply = self._call(self._stub.Answer, AnswerRequest(envelope=envelope), timeout_seconds)
        return bytes(reply.envelope)

    def status(self) -> AgentStatus:
        """How the site stands.

        Raises:
            AgentUnavailable: nobody listens.
        """
        return self._status(self._stub.Status)

    def pause(self) -> AgentStatus:
        """Let the site answer nothing until ``resume``.

        Raises:
            AgentUnavailable: nobody listens.
        """
        return self._status(self._stub.Pause)

    def resume(self) -> AgentStatus:
        """Let the site answer again.

        Raises:
            AgentUnavailable: nobody listens.
        """
        return self._status(self._stub.Resume)

    def drain(self) -> AgentStatus:
        """Let the site finish what it answers now, and then end.

        Raises:
            AgentUnavailable: nobody listens.
        """
        return self._status(self._stub.Drain)

    def leave(self, *, even_so: bool) -> AgentStatus:
        """Let the site finish what it answers now, and then end for good.

        Raises:
            AgentUnavailable: nobody listens.
            LeaveRefused: answers that were charged for have not been delivered, and ``even_so`` does not say to leave.
        """
        return self._status(self._stub.Leave, LeaveRequest(even_so=even_so))

    def _status(self, method: Any, request: Any = _NOTHING) -> AgentStatus:
        status = self._call(method, request, _STATUS_SECONDS)
        return AgentStatus(
            mode=Mode(status.mode),
            answering=status.answering,
            answered=status.answered,
            link=status.link,
            activity=Activity(job=status.job, stage=status.stage, refusal=status.refusal),
            budgets=tuple((one.cohort, one.side, one.epsilon, one.ceiling) for one in status.budgets),
            undelivered=status.undelivered,
        )

    def _call(self, method: Any, request: Any, timeout_seconds: float | None) -> Any:
        try:
            return method(request, timeout=timeout_seconds)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise LeaveRefused(error.details()) from error
            if error.code() is grpc.StatusCode.UNAVAILABLE and _nobody_listens(self._path):
                raise AgentUnavailable(
                    f"site at {self._path}: no node runs; start it with `fedgrade site up`, which takes a while"
                ) from error
            raise AgentUnavailable(f"site at {self._path}: {error.code().name}: {error.details()}") from error


class _Servicer(AgentServicer):  # type: ignore[misc]  # generated code has no types
    """The calls of agent.proto, answered by one gate."""

    def __init__(self, gate: Gate, words: Words, on_delivered: Callable[[bytes], None]) -> None:
        self._gate = gate
        self._words = words
        self._on_delivered = on_delivered

    def Answer(self, request: AnswerRequest, context: grpc.ServicerContext) -> AnswerReply:  # noqa: N802 -- gRPC's name
        try:
            reply = AnswerReply(envelope=self._gate.answer(request.envelope))
        except SiteClosed as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except Exception:
            # A door: the caller may be foreign code, so it gets no trace; the operator finds it in the log.
            logger.exception("the site could not answer a request on its socket")
            context.abort(grpc.StatusCode.INTERNAL, "the site could not answer; its operator has the reason")
        # As far as can be told here: whoever asked, asks again if it was lost on the way.
        self._on_delivered(request.envelope)
        return reply

    def Status(self, request: Nothing, context: grpc.ServicerContext) -> SiteStatus:  # noqa: N802
        del request, context
        activity = self._words.activity()
        budgets = [
            Budget(
                cohort=one.account.cohort,
                side="training" if one.account.partition == "train" else "held-out",
                epsilon=one.epsilon,
                ceiling=one.ceiling,
            )
            for one in self._words.standings()
        ]
        return SiteStatus(
            mode=self._gate.mode,
            answering=self._gate.answering,
            answered=self._gate.answered,
            link=self._words.link(),
            job=activity.job,
            stage=activity.stage,
            refusal=activity.refusal,
            budgets=budgets,
            undelivered=self._words.undelivered(),
        )

    def Pause(self, request: Nothing, context: grpc.ServicerContext) -> SiteStatus:  # noqa: N802
        self._gate.pause()
        return self.Status(request, context)

    def Resume(self, request: Nothing, context: grpc.ServicerContext) -> SiteStatus:  # noqa: N802
        self._gate.resume()
        return self.Status(request, context)

    def Drain(self, request: Nothing, context: grpc.ServicerContext) -> SiteStatus:  # noqa: N802
        self._gate.drain()
        return self.Status(request, context)

    def Leave(self, request: LeaveRequest, context: grpc.ServicerContext) -> SiteStatus:  # noqa: N802
        waiting = self._words.undelivered()
        if waiting and not request.even_so:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, undelivered_words(waiting))
        return self.Drain(Nothing(), context)


def undelivered_words(answers: int) -> str:
    """Why a site with so many undelivered answers does not leave."""
    return (
        f"answers charged for and not seen to reach the coordinator: {answers}; let the node run until they did, or "
        "leave with --undelivered, and their privacy was spent for nothing"
    )


def listens(path: Path) -> bool:
    """Whether a site's process listens on the socket at ``path``."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def _nobody_listens(path: Path) -> bool:
    """Whether that is certain: where one may not even look, somebody may listen."""
    try:
        return not listens(path)
    except OSError:
        return False


def _claim(path: Path) -> None:
    """Make ``path`` free for a socket of ours.

    Raises:
        DocumentRefused: see ``AgentServer.__enter__``.
    """
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise DocumentRefused(f"socket {path}: at most {_MAX_SOCKET_PATH_BYTES} bytes; choose a shorter folder")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.parent.stat()
    if found.st_mode & _OTHERS:
        raise DocumentRefused(f"socket folder {path.parent}: others may enter; run chmod 700 {path.parent}")
    if found.st_uid != os.geteuid():
        raise DocumentRefused(f"socket folder {path.parent}: belongs to user {found.st_uid}; choose one of your own")
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise DocumentRefused(f"socket {path}: a file of another kind is there; move it away")
    # gRPC would silently take over the socket of a site that still runs.
    if listens(path):
        raise DocumentRefused(f"socket {path}: the site's process already listens there; stop it first")
    path.unlink()
