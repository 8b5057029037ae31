"""A listener on the open network: who has not said in time what it wants is disconnected, and nobody holds many places.

uvicorn waits for ever for a request's header, bounds neither headers nor connections by address, and gives a TLS
handshake a minute. This one accepts connections itself, hands them to uvicorn's protocol, and watches them. Whoever has
shown an enrolled key counts as known and is not crowded out; among strangers the oldest connection makes room for a new
one, so that somebody who says at once what it wants gets through, whatever others hold.
"""

import asyncio
import ipaddress
import logging
import resource
import socket
import ssl
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, cast

import uvicorn

logger = logging.getLogger(__name__)

_LOOKS: Final = 10  # within the time for a header
_HEAP: Final = 4  # requests
_PAUSE_SECONDS: Final = 0.05
_IPV6_SITE_BITS: Final = 64  # one customer of a provider holds all addresses below such a prefix
_SPARE_FILES: Final = 256


Peer = tuple[str, int]  # host and port


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What strangers get.

    Attributes:
        handshake_seconds: for TLS.
        header_seconds: without a whole request, since the connection began or the last answer ended.
        header_bytes: of one request's line and headers.
        strangers: connections that have not shown an enrolled key, in all.
        strangers_by_address: the same, from one address (IPv6: one /64).
        connections_by_key: of one enrolled key.
        connections: in all.
    """

    handshake_seconds: float = 5.0
    header_seconds: float = 10.0
    header_bytes: int = 32 * 1024
    strangers: int = 1024
    strangers_by_address: int = 128
    connections_by_key: int = 32
    connections: int = 8192


class _Place:
    """One connection, from its first byte on."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.origin = _origin(peer[0])
        self.key: bytes = b""
        self.waiting_since: float | None = None
        self.header_bytes = 0
        self.protocol: Any = None
        self.task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a request of it is being answered."""
        cycle = getattr(self.protocol, "cycle", None)
        return cycle is not None and not cycle.response_complete

    def close(self) -> None:
        """End it now; what the peer has not read is lost."""
        if self.protocol is not None and self.protocol.transport is not None:
            self.protocol.transport.abort()
        elif self.task is not None:
            self.task.cancel()


class Watch:
    """Every connection of a listener, the oldest first."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self._strangers: dict[Peer, _Place] = {}
        self._known: dict[Peer, _Place] = {}
        self._by_origin: dict[object, dict[Peer, _Place]] = {}
        self._by_key: dict[object, dict[Peer, _Place]] = {}

    def __len__(self) -> int:
        return len(self._strangers) + len(self._known)

    def know(self, peer: Any, key: bytes) -> None:
        """Take note that the connection from ``peer``, host and port, showed the enrolled ``key``."""
        place = self._strangers.pop(tuple(peer), None) if peer else None
        if place is None:
            return
        _take(self._by_origin, place.origin, place)
        of_key = self._by_key.get(key, {})
        if len(of_key) >= self.limits.connections_by_key:
            self._evict(next(iter(of_key.values())))
        place.key = key
        self._known[place.peer] = place
        self._by_key.setdefault(key, {})[place.peer] = place

    def admit(self, place: _Place) -> bool:
        """Whether ``place`` may go on; somebody else's may end for it."""
        of_origin = self._by_origin.get(place.origin, {})
        if len(of_origin) >= self.limits.strangers_by_address:
            self._evict(next(iter(of_origin.values())))
        elif len(self._strangers) >= self.limits.strangers:
            self._evict(next(iter(self._strangers.values())))
        if len(self) >= self.limits.connections:
            return False
        self._strangers[place.peer] = place
        self._by_origin.setdefault(place.origin, {})[place.peer] = place
        return True

    def leave(self, place: _Place) -> None:
        """``place`` has ended, or is about to."""
        if self._strangers.get(place.peer) is place:
            del self._strangers[place.peer]
            _take(self._by_origin, place.origin, place)
        if self._known.get(place.peer) is place:
            del self._known[place.peer]
            _take(self._by_key, place.key, place)

    def look(self, now: float) -> None:
        """End whoever has kept us waiting for too long."""
        for place in [*self._strangers.values(), *self._known.values()]:
            if place.busy:
                place.waiting_since = None
            elif place.waiting_since is None:
                place.waiting_since = now
            elif now - place.waiting_since > self.limits.header_seconds:
                place.close()

    def _evict(self, place: _Place) -> None:
        self.leave(place)
        place.close()


class GuardedServer(uvicorn.Server):
    """uvicorn, with connections that are accepted here and watched."""

    def __init__(self, config: uvicorn.Config, watch: Watch) -> None:
        super().__init__(config)
        self._watch = watch
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen.

        Raises:
            SystemExit: the address is taken, or none of this machine's.
        """
        del sockets
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            self.should_exit = True
            return
        self._watch.limits = _within_files(self._watch.limits)
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(
            self.config.host, self.config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        try:
            listening = [_listen(family, address, self.config.backlog) for family, _, _, _, address in found]
        except OSError as error:
            logger.error("cannot listen on %s port %d: %s", self.config.host, self.config.port, error)  # noqa: TRY400
            await self.lifespan.shutdown()
            raise SystemExit(1) from error
        for one in listening:
            self._start(self._accept(one))
        self._start(self._look())
        self.servers = [_Ending(self._tasks, listening)]  # type: ignore[list-item]
        self.started = True

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._watch.limits.header_seconds / _LOOKS)
            self._watch.look(loop.time())

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError as error:
                # No file descriptor left, or a peer that was gone at once: neither ends the listener.
                logger.debug("accept: %s", error)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            place = _Place(peer[:2])
            if not self._watch.admit(place):
                connection.close()
                continue
            place.task = self._start(self._hand_over(place, connection))

    async def _hand_over(self, place: _Place, connection: socket.socket) -> None:
        """Give ``connection`` to uvicorn's protocol once TLS stands."""
        loop, limits = asyncio.get_running_loop(), self._watch.limits
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(
                lambda: self._protocol(place, loop),
                connection,
                ssl=self.config.ssl,
                ssl_handshake_timeout=limits.handshake_seconds,
                ssl_shutdown_timeout=limits.handshake_seconds,
            )
        except (OSError, ssl.SSLError, TimeoutError, asyncio.CancelledError) as error:
            # Whatever a stranger sends in the place of TLS.
            logger.debug("connection from %s: %s", place.peer, error or type(error).__name__)
            self._watch.leave(place)
            connection.close()

    def _protocol(self, place: _Place, loop: asyncio.AbstractEventLoop) -> asyncio.Protocol:
        kind = _watched(cast("Any", self.config.http_protocol_class))
        protocol: Any = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
        )
        protocol.watch, protocol.place = self._watch, place
        place.protocol = protocol
        return cast("asyncio.Protocol", protocol)


class _Ending:
    """What uvicorn closes when it ends: the listening sockets, and everything that is done for them."""

    def __init__(self, tasks: set[asyncio.Task[None]], listening: list[socket.socket]) -> None:
        self._tasks = tasks
        self._listening = listening

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for one in self._listening:
            one.close()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)


@cache
def _watched(base: Any) -> Any:
    """The protocol ``base`` of uvicorn, which tells its place what comes and when it ends."""

    class Watched(base):  # type: ignore[misc]
        watch: Watch
        place: _Place

        def data_received(self, data: bytes) -> None:
            place = self.place
            if not place.busy:
                place.header_bytes += len(data)
            super().data_received(data)
            if place.busy:
                place.header_bytes, place.waiting_since = 0, None
            # A node waits for one answer before it asks again, though it may have all of it before uvicorn has noted
            # its end; requests in a heap would only take memory.
            if place.header_bytes > self.watch.limits.header_bytes or len(getattr(self, "pipeline", ())) > _HEAP:
                place.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self.watch.leave(self.place)
            super().connection_lost(exc)

    return Watched


def _take(places: dict[object, dict[Peer, _Place]], of: object, place: _Place) -> None:
    """``places`` without ``place``."""
    places[of].pop(place.peer, None)
    if not places[of]:
        del places[of]


def _origin(host: str) -> object:
    """Who is counted as one: an IPv4 address, or the network that one customer of a provider has."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 4:  # noqa: PLR2004 - the protocol's number
        return address
    mapped = address.ipv4_mapped
    return mapped or ipaddress.ip_network((address, _IPV6_SITE_BITS), strict=False)


def _listen(family: int, address: Any, backlog: int) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        # As uvicorn has it: "::" is not also 0.0.0.0.
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    listening.listen(backlog)
    listening.setblocking(False)
    return listening


def _within_files(limits: Limits) -> Limits:
    """``limits`` that fit into the files that this process may open, after it asked for as many as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + _SPARE_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    connections = max(2, allowed - _SPARE_FILES)
    return replace(
        limits, connections=min(limits.connections, connections), strangers=min(limits.strangers, connections // 2)
    )
