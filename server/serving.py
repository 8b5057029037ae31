"""A SuperLink that stays: started once, kept in step with who is enrolled, and found again by the other commands."""

import fcntl
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedgrade.errors import DocumentRefused, FedgradeError, JobRefused
from fedgrade.federation.store import write_durably
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.identity import SiteId
from server.control import Control
from server.coordinator_file import NAME, read_settings
from server.coordinator_folder import CoordinatorFolder
from server.deployment import Deployment, Listen
from server.enrolment import bring_up_to_date, node_keys
from server.local_federation import LocalFederation
from server.nodes_file import NAME as NODES
from server.nodes_file import read_nodes, version, write_nodes
from server.private_files import read_private

logger = logging.getLogger(__name__)

# How soon a running SuperLink takes note of an enrolment or a revocation; a look costs a stat of one file.
_LOOK_SECONDS: Final = 0.25
_WAIT_SECONDS: Final = 5.0


class NotServing(FedgradeError):
    """No SuperLink serves the coordinator's folder now."""


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a SuperLink that serves is reached: ``address`` by partners, ``admin`` by the coordinator's commands."""

    address: str
    admin: str


def serve_folder(root: Path, *, stop: threading.Event, on_up: Callable[[str, Path], None]) -> None:
    """Serve the coordinator's folder ``root`` until ``stop`` is set; who is enrolled meanwhile may connect.

    Args:
        root: the folder; one made by ``fedgrade coordinator init`` says where to listen, any other is on loopback.
        stop: ends every process that was started, within seconds.
        on_up: called with its address and its authority's certificate once the SuperLink takes nodes.

    Raises:
        JobRefused: another process serves the folder.
        DeploymentFailed: a process did not start, or ended.
    """
    folder = CoordinatorFolder(root=root)
    listen = Listen()
    if (root / NAME).exists():
        settings = read_settings(root)
        listen = Listen(
            interface=settings.interface,
            hosts=(settings.host,),
            public_port=settings.public_port,
            admin_port=settings.admin_port,
        )
        bring_up_to_date(folder, now=datetime.now(UTC))
    with _only_one(root), Deployment(root, listen=listen) as deployment, _announced(root, deployment):
        if not folder.book.exists():
            LocalFederation(root=root).connect(deployment.address, deployment.authority)
        nodes = _NodeList(deployment.control, folder)
        nodes.bring_up_to_date()
        on_up(deployment.address, deployment.authority)
        while not stop.wait(_LOOK_SECONDS):
            deployment.must_be_alive()
            nodes.follow()


@contextmanager
def attached(root: Path) -> Iterator[Control]:
    """A hand on the SuperLink that serves ``root``.

    Raises:
        NotServing: none does.
    """
    if not is_served(root):
        raise NotServing(f"{root}: no SuperLink serves it; start one with `fedgrade serve {root}`")
    listening = _listening(root)
    if listening is None:
        raise NotServing(f"{root}: its SuperLink is still starting; try again in a moment")
    superlink = root / "superlink"
    with Control(
        listening.admin, authority=superlink / "ca.pem", token=read_private(superlink / "token").strip()
    ) as control:
        yield control


def is_served(root: Path) -> bool:
    """Whether a process serves ``root`` now."""
    try:
        with _lock_file(root).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def wait_for_nodes(root: Path, done: Callable[[Mapping[SiteId, int]], bool]) -> bool:
    """Whether the nodes of the SuperLink that serves ``root`` came to be ``done`` within some seconds."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        if (root / NODES).exists() and done(read_nodes(root)):
            return True
        time.sleep(0.05)
    return False


class _NodeList:
    """Keeps the SuperLink's nodes, and ``nodes.json``, those of the sites that are enrolled."""

    def __init__(self, control: Control, folder: CoordinatorFolder) -> None:
        self._control = control
        self._folder = folder
        self._seen: object = None

    def follow(self) -> None:
        """Bring the list up to date if somebody came or went; what cannot be done now is tried again."""
        try:
            if self._version() != self._seen:
                self.bring_up_to_date()
        except FedgradeError as error:
            logger.warning("enrolments not taken note of yet: %s", error)

    def bring_up_to_date(self) -> None:
        """Register who is enrolled, and strike off everybody else first.

        Raises:
            ControlRefused: the SuperLink said no.
            DocumentRefused: what says who is enrolled is malformed.
        """
        seen = self._version()
        wanted = node_keys(self._folder)
        listed = {node.public_key: node.node for node in self._control.nodes()}
        for key in listed.keys() - set(wanted.values()):
            self._control.unregister(listed[key])
        nodes = {
            site: listed[key] if key in listed else self._control.register_key(key, site)
            for site, key in wanted.items()
        }
        write_nodes(self._folder.root, nodes)
        self._seen = seen

    def _version(self) -> object:
        return version(self._folder.book), version(self._folder.roster)


def _lock_file(root: Path) -> Path:
    return root / "superlink" / "serve.lock"


def _listening_file(root: Path) -> Path:
    return root / "superlink" / "listening.json"


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    path = _lock_file(root)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with path.open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobRefused(f"{root}: another process serves it already") from error
        # Of a process that was killed.
        _listening_file(root).unlink(missing_ok=True)
        yield


@contextmanager
def _announced(root: Path, deployment: Deployment) -> Iterator[None]:
    path = _listening_file(root)
    write_durably(path, encode(Listening(address=deployment.address, admin=deployment.admin)))
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
