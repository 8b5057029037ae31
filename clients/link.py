"""How a node reaches its SuperLink: what a partner's files say of it, now and while the node runs."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol, Self

from clients.fleet import FleetAccess
from clients.node_key import load_node_key, next_node_key, promote_node_key
from fedgrade.errors import DocumentRefused
from fedgrade.federation.messages import MAX_MESSAGE_BYTES

logger = logging.getLogger(__name__)

_MAX_CERTIFICATE_BYTES: Final = 256 * 1024
_MIN_HEARTBEAT_SECONDS: Final = 10.0  # flwr.common.constant.HEARTBEAT_MIN_INTERVAL
_MAX_HEARTBEAT_SECONDS: Final = 1800.0


@dataclass(frozen=True, kw_only=True)
class NodeLink:
    """How a site reaches its SuperLink.

    Attributes:
        address: ``host:port`` of the public listener.
        root_certificate: PEM file of the coordinator's authority.
        node_key: private EC P-384 key file, mode 0600.
        busy_poll_seconds: shortest wait between two polls, while a run is on.
        idle_poll_seconds: longest wait between two polls.
        heartbeat_seconds: a node that dies without a word is held for online during twice this time; only its own
            successor, on the same machine, is let in before.
        retry_cap_seconds: longest wait before the link is tried again.
        max_message_bytes: larger requests are refused, of which less than a piece more is read.
    """

    address: str
    root_certificate: Path
    node_key: Path
    busy_poll_seconds: float = 0.1
    idle_poll_seconds: float = 3.0
    heartbeat_seconds: float = 10.0
    retry_cap_seconds: float = 15.0
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal():
            raise DocumentRefused(f"SuperLink address {self.address!r}: expected host:port")
        if not 0 < self.busy_poll_seconds <= self.idle_poll_seconds:
            raise DocumentRefused(
                f"busy_poll_seconds {self.busy_poll_seconds}: above 0, at most {self.idle_poll_seconds}"
            )
        if not _MIN_HEARTBEAT_SECONDS <= self.heartbeat_seconds <= _MAX_HEARTBEAT_SECONDS:
            raise DocumentRefused(
                f"heartbeat_seconds {self.heartbeat_seconds}: Flower takes {_MIN_HEARTBEAT_SECONDS:.0f} to "
                f"{_MAX_HEARTBEAT_SECONDS:.0f}"
            )
        if self.retry_cap_seconds <= 0 or self.max_message_bytes < 1:
            raise DocumentRefused(
                f"retry_cap_seconds {self.retry_cap_seconds} and max_message_bytes {self.max_message_bytes}: "
                "both must be above 0"
            )

    def now(self) -> Self:
        """This link, which does not change."""
        return self


class LinkSource(Protocol):
    """Who knows how the SuperLink is reached at this moment; asked before each poll."""

    def now(self) -> NodeLink:
        """The link as it is now."""


class Standing:
    """The link that a connection was made by, and whether it is another one by now."""

    def __init__(self, source: LinkSource) -> None:
        self._source = source
        self._next_key = False
        self.link = source.now()
        self._seen = _versions(self.link)

    @property
    def changed(self) -> bool:
        """Whether the link, or a file that it names, is another one than when it was last read."""
        return _versions(self._source.now()) != self._seen

    def access(self) -> FleetAccess:
        """What a connection needs, read now.

        Raises:
            DocumentRefused: key or certificate cannot be read.
        """
        self.link = self._source.now()
        # Before they are read: what changes meanwhile is read again.
        self._seen = _versions(self.link)
        waiting = next_node_key(self.link.node_key)
        self._next_key = self._next_key and waiting.exists()
        if self._next_key:
            self.link = replace(self.link, node_key=waiting)
        return FleetAccess(
            address=self.link.address,
            root_certificate=_read_certificate(self.link.root_certificate),
            key=load_node_key(self.link.node_key),
            max_message_bytes=self.link.max_message_bytes,
            heartbeat_seconds=self.link.heartbeat_seconds,
        )

    def try_other_key(self) -> None:
        """Sign on with the key that waits for its enrolment next time, if there is one; or again with the old one."""
        self._next_key = not self._next_key

    def signed_on(self) -> None:
        """The SuperLink took the key: if it is the one that waited, it is the node's key from here on."""
        if self._next_key:
            promote_node_key(self._source.now().node_key)
            logger.info("node key: the new one is in force")


def version(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


def _versions(link: NodeLink) -> tuple[object, ...]:
    return link, version(link.root_certificate), version(link.node_key)


def _read_certificate(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_CERTIFICATE_BYTES)
    except OSError as error:
        raise DocumentRefused(f"root certificate {path}: {error.strerror}; ask the coordinator for it") from error
