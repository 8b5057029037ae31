"""How a coordinator's commands find the SuperLink that serves their folder. Light: no Flower unless there is one."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedgrade.errors import DocumentRefused, FedgradeError, JobRefused
from fedgrade.federation.store import write_durably
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.file_lock import is_held, lock_alone
from fedgrade.trust.identity import SiteId
from server.nodes_file import NAME, read_nodes
from server.private_files import read_private

if TYPE_CHECKING:
    from server.control import Control

_WAIT_SECONDS: Final = 5.0
_STOP_SECONDS: Final = 30.0


class NotServing(FedgradeError):
    """No SuperLink serves the coordinator's folder now."""


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a SuperLink that serves is reached: ``address`` by partners, ``admin`` by the coordinator's commands."""

    address: str
    admin: str


@contextmanager
def attached(root: Path) -> Iterator["Control"]:
    """A hand on the SuperLink that serves ``root``.

    Raises:
        NotServing: none does.
    """
    if not is_served(root):
        raise NotServing(f"{root}: no SuperLink serves it; start one with `fedgrade serve {root}`")
    listening = _listening(root)
    if listening is None:
        raise NotServing(f"{root}: its SuperLink is still starting; try again in a moment")
    from server.control import Control  # noqa: PLC0415 - Flower takes a second

    token = read_private(root / "superlink" / "token").strip()
    with Control(listening.admin, authority=admin_authority(root), token=token) as control:
        yield control


def admin_authority(root: Path) -> Path:
    """The certificate by which the coordinator's own tools know the SuperLink that serves ``root``, on loopback."""
    return root / "superlink" / "admin" / "ca.pem"


def is_served(root: Path) -> bool:
    """Whether a process serves ``root`` now."""
    return is_held(_lock_file(root))


def wait_for_nodes(root: Path, done: Callable[[Mapping[SiteId, int]], bool]) -> bool:
    """Whether the nodes of the SuperLink that serves ``root`` came to be ``done`` within some seconds."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        if (root / NAME).exists() and done(read_nodes(root)):
            return True
        time.sleep(0.05)
    return False


def wait_for_end(ledger: Path) -> bool:
    """Whether the run that writes ``ledger`` gave it up within some seconds."""
    deadline = time.monotonic() + _STOP_SECONDS
    while is_held(ledger):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _lock_file(root: Path) -> Path:
    return root / "superlink" / "serve.lock"


def _listening_file(root: Path) -> Path:
    return root / "superlink" / "listening.json"


@contextmanager
def only_server(root: Path) -> Iterator[None]:
    """Nobody else serves ``root`` until the block ends.

    Raises:
        JobRefused: somebody does already.
    """
    path = _lock_file(root)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with path.open("wb") as lock:
        if not lock_alone(lock):
            raise JobRefused(f"{root}: another process serves it already")
        # Of a process that was killed.
        _listening_file(root).unlink(missing_ok=True)
        yield


@contextmanager
def announced(root: Path, listening: Listening) -> Iterator[None]:
    """Commands find ``listening`` until the block ends."""
    path = _listening_file(root)
    write_durably(path, encode(listening))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _listening(root: Path) -> Listening | None:
    path = _listening_file(root)
    try:
        return decode(Listening, path.read_bytes(), what=f"{path}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DocumentRefused(f"{path}: cannot be read ({error.strerror})") from error
