"""Who is connected to the public listener, and who has to go: a book of places, which knows no socket.

Whoever has shown an enrolled key counts as known and is not crowded out; among strangers the oldest connection makes
room for a new one, so that somebody who says at once what it wants gets through, whatever others hold.
"""

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_IPV6_SITE_BITS: Final = 64  # one customer of a provider holds all addresses below such a prefix

PLACE: Final = "fedgrade_place"  # in a request's state: the connection that it came over

Peer = tuple[str, int]  # host and port


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What strangers get.

    Attributes:
        handshake_seconds: for TLS.
        header_seconds: without a whole request, since the connection began or the last answer ended.
        header_bytes: of one request's line and headers.
        reading_seconds: for a peer to take what was sent of an answer (server/slices.py) before more of it is; its end
            has ``header_seconds``.
        strangers: connections that have not shown an enrolled key, in all.
        strangers_by_address: the same, from one address (IPv6: one /64).
        connections_by_key: of one enrolled key.
        connections: in all.
        new_at_once: connections that one address may begin together; each costs a handshake.
        new_a_second: how many of those it may begin again each second.
    """

    handshake_seconds: float = 5.0
    header_seconds: float = 10.0
    header_bytes: int = 32 * 1024
    reading_seconds: float = 30.0
    strangers: int = 1024
    strangers_by_address: int = 128
    connections_by_key: int = 32
    connections: int = 8192
    new_at_once: int = 512
    new_a_second: float = 100.0


class Place:
    """One connection, from its first byte on."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.origin = origin(peer[0])
        self.key: bytes = b""
        self.waiting_since: float | None = None
        self.header_bytes = 0
        self.protocol: Any = None
        self.give_up: Callable[[], object] = lambda: None  # before there is a protocol

    @property
    def busy(self) -> bool:
        """Whether a request of it is being answered."""
        cycle = getattr(self.protocol, "cycle", None)
        return cycle is not None and not cycle.response_complete

    def close(self) -> None:
        """End it now; what the peer has not read is lost."""
        if self.protocol is not None and self.protocol.transport is not None:
            self.protocol.transport.abort()
        else:
            self.give_up()


class Watch:
    """Every connection of a listener, the oldest first."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        # Not by peer: two connections share one where they go to two of our addresses. The values mean nothing.
        self._strangers: dict[Place, None] = {}
        self._known: dict[Place, None] = {}
        self._by_origin: dict[object, dict[Place, None]] = {}
        self._by_key: dict[object, dict[Place, None]] = {}
        self._begun: dict[object, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._strangers) + len(self._known)

    def know(self, place: Place, key: bytes) -> None:
        """Take note that ``place`` showed the enrolled ``key``."""
        if place not in self._strangers:
            return
        del self._strangers[place]
        _take(self._by_origin, place.origin, place)
        of_key = self._by_key.get(key, {})
        if len(of_key) >= self.limits.connections_by_key:
            self._evict(next(iter(of_key)))
        place.key = key
        self._known[place] = None
        self._by_key.setdefault(key, {})[place] = None

    def admit(self, place: Place, now: float) -> bool:
        """Whether ``place`` may go on; somebody else's may end for it."""
        begun = self._still_begun(place.origin, now)
        if begun + 1 > self.limits.new_at_once:
            return False
        self._begun[place.origin] = (begun + 1, now)
        of_origin = self._by_origin.get(place.origin, {})
        if len(of_origin) >= self.limits.strangers_by_address:
            self._evict(next(iter(of_origin)))
        elif len(self._strangers) >= self.limits.strangers:
            self._evict(next(iter(self._strangers)))
        if len(self) >= self.limits.connections:
            return False
        self._strangers[place] = None
        self._by_origin.setdefault(place.origin, {})[place] = None
        return True

    def leave(self, place: Place) -> None:
        """``place`` has ended, or is about to."""
        if place in self._strangers:
            del self._strangers[place]
            _take(self._by_origin, place.origin, place)
        if place in self._known:
            del self._known[place]
            _take(self._by_key, place.key, place)

    def look(self, now: float) -> None:
        """End whoever has kept us waiting for too long."""
        self._begun = {of: found for of, found in self._begun.items() if self._still_begun(of, now) > 0}
        for place in [*self._strangers, *self._known]:
            if place.busy:
                place.waiting_since = None
            elif place.waiting_since is None:
                place.waiting_since = now
            elif now - place.waiting_since > self.limits.header_seconds:
                place.close()

    def _still_begun(self, of: object, now: float) -> float:
        """How many connections count as begun together by one address."""
        begun, at = self._begun.get(of, (0.0, now))
        return max(0.0, begun - (now - at) * self.limits.new_a_second)

    def _evict(self, place: Place) -> None:
        self.leave(place)
        place.close()


def _take(places: dict[object, dict[Place, None]], of: object, place: Place) -> None:
    """``places`` without ``place``."""
    places[of].pop(place, None)
    if not places[of]:
        del places[of]


def origin(host: str) -> object:
    """Who is counted as one: an IPv4 address, or the network that one customer of a provider has."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 4:  # noqa: PLR2004 - the protocol's number
        return address
    mapped = address.ipv4_mapped
    return mapped or ipaddress.ip_network((address, _IPV6_SITE_BITS), strict=False)
