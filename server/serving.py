"""A SuperLink that stays: started once, kept in step with who is enrolled, and found again by the other commands."""

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedgrade.errors import FedgradeError
from server.attached import Listening, announced, only_server
from server.control import Control
from server.coordinator_file import NAME, read_settings
from server.coordinator_folder import CoordinatorFolder
from server.deployment import Deployment, Listen
from server.enrolment import bring_up_to_date, node_keys
from server.local_federation import LocalFederation
from server.nodes_file import version, write_nodes

logger = logging.getLogger(__name__)

# How soon a running SuperLink takes note of an enrolment or a revocation; a look costs a stat of one file.
_LOOK_SECONDS: Final = 0.25


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
    with only_server(root), Deployment(root, listen=listen) as deployment:
        if not folder.book.exists():
            LocalFederation(root=root).connect(deployment.address, deployment.authority)
        nodes = _NodeList(deployment.control, folder)
        nodes.bring_up_to_date()
        with announced(root, Listening(address=deployment.address, admin=deployment.admin)):
            on_up(deployment.address, deployment.authority)
            while not stop.wait(_LOOK_SECONDS):
                deployment.must_be_alive()
                nodes.follow()


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
