"""A SuperLink that stays: kept alive, kept in step with who is enrolled, and found again by the other commands.

Flower keeps its state in memory, where a small round takes a quarter of the time that it takes with a database. Nothing
is lost with it that is not in the coordinator's folder: who is enrolled stands in the book, and a run goes on from its
own checkpoint, where sites send again what they have charged for. So a SuperLink that died is started again, its nodes
are registered again, and the run that was on is submitted again, by whoever serves next or by the same process.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedgrade.errors import FedgradeError
from server.attached import Listening, admin_authority, announced, only_server
from server.beside import Beside
from server.certificates import certify
from server.control import Control, NoAnswer
from server.coordinator_file import NAME, read_settings
from server.coordinator_folder import CoordinatorFolder
from server.deployment import Deployment, DeploymentFailed, Listen
from server.enrolment import NewestBook, bring_up_to_date, node_keys
from server.interrupted_run import InterruptedRun
from server.local_federation import LocalFederation
from server.nodes_file import version, write_nodes

logger = logging.getLogger(__name__)

# How soon a running SuperLink takes note of an enrolment or a revocation; a look costs a stat of one file.
_LOOK_SECONDS: Final = 0.25
_RENEW_LOOK_SECONDS: Final = 3600.0
# A SuperLink that lived so long is well; before that, the next one is waited for twice as long as the one before.
_WELL_SECONDS: Final = 10.0
_MOST_PAUSE_SECONDS: Final = 60.0
# After what could not be done, such as on a full disk.
_RETRY_SECONDS: Final = 1.0
_RENEW_RETRY_SECONDS: Final = 60.0
# How often a SuperLink is asked whether it is well. A question waits half a minute for its answer; after so many
# without one, neither a run nor a node gets any further.
_ASK_SECONDS: Final = 10.0
_MOST_SILENCES: Final = 2


def serve_folder(root: Path, *, stop: threading.Event, on_up: Callable[[str, Path], None]) -> None:
    """Serve the coordinator's folder ``root`` until ``stop`` is set; who is enrolled meanwhile may connect.

    A run whose process died, with the others or alone, goes on as soon as enough of its sites are back.

    Args:
        root: the folder; one made by ``fedgrade coordinator init`` says where to listen, any other is on loopback.
        stop: ends every process that was started, within seconds.
        on_up: called with its address and its authority's certificate once the SuperLink takes nodes.

    Raises:
        JobRefused: another process serves the folder.
        DeploymentFailed: a process did not start.
        StoreUnavailable: another machine uses the folder's database.
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
    # Held to the end: no other machine uses the database of a federation that is served here.
    with folder.held() as must_be_ours, only_server(root), Deployment(root, listen=listen) as deployment:
        if not folder.book.exists():
            LocalFederation(root=root).connect(deployment.address, deployment.authority)
        nodes, interrupted = _NodeList(deployment.control, folder), InterruptedRun(deployment.control, folder)
        nodes.bring_up_to_date()
        certificates = _Certificates(folder)
        with announced(root, Listening(address=deployment.address, admin=deployment.admin)):
            on_up(deployment.address, deployment.authority)
            processes, watchdog = _Processes(deployment), _Watchdog(deployment)
            while not stop.wait(_LOOK_SECONDS):
                must_be_ours()
                if not processes.alive():
                    continue
                if processes.restarted():
                    nodes.forget()
                    interrupted.restarted()
                    watchdog.forget()
                watchdog.follow()
                nodes.follow()
                certificates.follow()
                interrupted.follow()


class _Processes:
    """Starts SuperLink and superexec again when one of them ends, after a pause that grows while they do not last."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._up_since = time.monotonic()
        self._not_before = 0.0
        self._pause = 0.0
        # A restart that failed leaves fewer processes than there should be, and each of those may live.
        self._down = False
        self._restarted = False

    def alive(self) -> bool:
        """Whether all of them run; tries to start those that do not, when it is time to."""
        if not self._down:
            try:
                self._deployment.must_be_alive()
            except DeploymentFailed as error:
                self._ended(error)
            else:
                return True
        if time.monotonic() < self._not_before:
            return False
        try:
            self._deployment.restart()
        except (FedgradeError, OSError) as error:
            self._wait_longer()
            logger.error("not started again, tried in %.0f s: %s", self._pause, error)  # noqa: TRY400 -- as above
            return False
        self._down, self._restarted, self._up_since = False, True, time.monotonic()
        return True

    def restarted(self) -> bool:
        """Whether they are others than when this was last asked."""
        restarted, self._restarted = self._restarted, False
        return restarted

    def _ended(self, error: DeploymentFailed) -> None:
        self._down = True
        if time.monotonic() - self._up_since > _WELL_SECONDS:
            self._pause, self._not_before = 0.0, 0.0
        else:
            self._wait_longer()
        logger.error("started again in %.0f s: %s", self._pause, error)

    def _wait_longer(self) -> None:
        self._pause = min(max(1.0, 2.0 * self._pause), _MOST_PAUSE_SECONDS)
        self._not_before = time.monotonic() + self._pause


class _Watchdog:
    """Ends a SuperLink that lives and answers nobody: a run would wait for it as long as Flower's client does.

    That is for ever.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        # An answer may take half a minute, in which revocations are to be taken note of.
        self._beside = Beside("watchdog")
        self._silences = 0
        self._superlinks = 0
        self._next = time.monotonic() + _ASK_SECONDS

    def forget(self) -> None:
        """The SuperLink is another one, and what the one before did not answer does not count."""
        self._silences = 0
        self._superlinks += 1

    def follow(self) -> None:
        """Ask when it is time to; one that was silent too often is killed, for whoever serves to start another."""
        if self._beside.busy or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _ASK_SECONDS
        if self._silences < _MOST_SILENCES:
            self._beside.begin(self._ask)
            return
        logger.error("the SuperLink was asked %d times and does not answer: it is killed", self._silences)
        self._deployment.process("superlink").kill()
        self.forget()

    def _ask(self) -> None:
        asked, silences = self._superlinks, 0
        try:
            self._deployment.control.online()
        except NoAnswer as error:
            silences = self._silences + 1
            logger.warning("no sign of life (%d of %d): %s", silences, _MOST_SILENCES, error)
        except FedgradeError as error:
            # To say no is an answer, and who has closed its port is about to end.
            logger.debug("%s", error)
        if asked == self._superlinks:
            self._silences = silences


class _Certificates:
    """Renews certificates before they end, and when the coordinator's host is another one; the SuperLink follows."""

    def __init__(self, folder: CoordinatorFolder) -> None:
        self._folder = folder
        self._seen = version(folder.root / NAME)
        self._next = time.monotonic() + _RENEW_LOOK_SECONDS
        # A database may be away for minutes, in which revocations are to be taken note of.
        self._beside = Beside("certificates")

    def follow(self) -> None:
        """Look once an hour, or when ``coordinator.yaml`` was saved; what fails is tried a minute later."""
        settings = self._folder.root / NAME
        if self._beside.busy or (version(settings) == self._seen and time.monotonic() < self._next):
            return
        self._seen, self._next = version(settings), time.monotonic() + _RENEW_LOOK_SECONDS
        self._beside.begin(self._renew)

    def _renew(self) -> None:
        settings, superlink, now = self._folder.root / NAME, self._folder.root / "superlink", datetime.now(UTC)
        try:
            certify(admin_authority(self._folder.root).parent, [], now=now)
            if settings.exists():
                # The bundle carries address and authority: it follows too.
                bring_up_to_date(self._folder, now=now)
            else:
                certify(superlink, [], now=now)
        except (FedgradeError, OSError) as error:
            self._next = time.monotonic() + _RENEW_RETRY_SECONDS
            logger.warning("certificates and bundle are as before: %s", error)


class _NodeList:
    """Keeps the SuperLink's nodes, and ``nodes.json``, those of the sites that are enrolled."""

    def __init__(self, control: Control, folder: CoordinatorFolder) -> None:
        self._control = control
        self._folder = folder
        self._newest = NewestBook()
        self._seen: object = None
        self._next = 0.0

    def forget(self) -> None:
        """The SuperLink is another one, which knows nobody."""
        self._seen, self._next = None, 0.0

    def follow(self) -> None:
        """Bring the list up to date if somebody came or went; what cannot be done now is tried again."""
        if time.monotonic() < self._next:
            return
        try:
            if self._version() != self._seen:
                self.bring_up_to_date()
        except (FedgradeError, OSError) as error:
            self._next = time.monotonic() + _RETRY_SECONDS
            logger.warning("enrolments not taken note of yet: %s", error)

    def bring_up_to_date(self) -> None:
        """Register who is enrolled, and strike off everybody else first.

        Raises:
            ControlRefused: the SuperLink said no.
            DocumentRefused: what says who is enrolled is malformed.
        """
        seen = self._version()
        wanted = node_keys(self._folder, self._newest.read)
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
        # The bundle too: it is written last, and by its number an older book is known.
        return version(self._folder.book), version(self._folder.roster), version(self._folder.bundle)
