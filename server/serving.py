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
from server.certificates import certify
from server.control import Control
from server.coordinator_file import NAME, read_settings
from server.coordinator_folder import CoordinatorFolder
from server.deployment import Deployment, DeploymentFailed, Listen
from server.enrolment import bring_up_to_date, node_keys
from server.interrupted_run import InterruptedRun
from server.local_federation import LocalFederation
from server.nodes_file import version, write_nodes

logger = logging.getLogger(__name__)

# How soon a running SuperLink takes note of an enrolment or a revocation; a look costs a stat of one file.
_LOOK_SECONDS: Final = 0.25
_RENEW_LOOK_SECONDS: Final = 3600.0


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
    with folder.kept(), only_server(root), Deployment(root, listen=listen) as deployment:
        if not folder.book.exists():
            LocalFederation(root=root).connect(deployment.address, deployment.authority)
        nodes, interrupted = _NodeList(deployment.control, folder), InterruptedRun(deployment.control, folder)
        nodes.bring_up_to_date()
        certificates = _Certificates(folder)
        with announced(root, Listening(address=deployment.address, admin=deployment.admin)):
            on_up(deployment.address, deployment.authority)
            while not stop.wait(_LOOK_SECONDS):
                try:
                    deployment.must_be_alive()
                except DeploymentFailed as error:
                    logger.error("started again: %s", error)  # noqa: TRY400 -- the line says it all
                    deployment.restart()
                    nodes.bring_up_to_date()
                    interrupted = InterruptedRun(deployment.control, folder)
                nodes.follow()
                certificates.follow()
                interrupted.follow()


class _Certificates:
    """Renews certificates before they end, and when the coordinator's host is another one; the SuperLink follows."""

    def __init__(self, folder: CoordinatorFolder) -> None:
        self._folder = folder
        self._seen = version(folder.root / NAME)
        self._next = time.monotonic() + _RENEW_LOOK_SECONDS

    def follow(self) -> None:
        """Look once an hour, or when ``coordinator.yaml`` was saved; what fails is tried at the next look."""
        settings = self._folder.root / NAME
        if version(settings) == self._seen and time.monotonic() < self._next:
            return
        self._seen, self._next = version(settings), time.monotonic() + _RENEW_LOOK_SECONDS
        now, superlink = datetime.now(UTC), self._folder.root / "superlink"
        try:
            certify(admin_authority(self._folder.root).parent, [], now=now)
            if settings.exists():
                # The bundle carries address and authority: it follows too.
                bring_up_to_date(self._folder, now=now)
            else:
                certify(superlink, [], now=now)
        except FedgradeError as error:
            logger.warning("certificates and bundle are as before: %s", error)


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
