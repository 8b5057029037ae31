"""A listener on the open network: who has not said in time what it wants is disconnected, and nobody holds many places.

uvicorn waits for ever for a request's header and for who does not read its answer, bounds neither headers nor
connections by address, and gives a TLS handshake a minute. This one accepts connections itself, hands them to
uvicorn's protocol, and watches them.
"""

import asyncio
import errno
import logging
import resource
import socket
import ssl
from collections.abc import Coroutine
from dataclasses import replace
from functools import cache
from typing import Any, Final, cast

import uvicorn

from server.connections import PLACE, Limits, Place, Watch
from server.metrics import Application, Receive, Scope, Send

logger = logging.getLogger(__name__)

_LOOKS: Final = 10  # within the time for a header
_HEAP: Final = 4  # requests
_PAUSE_SECONDS: Final = 0.05
_SPARE_FILES: Final = 256
CANNOT_LISTEN: Final = "cannot listen on"
_ADVICE: Final = {
    errno.EADDRINUSE: "another process does; end it, or choose another port in coordinator.yaml",
    errno.EADDRNOTAVAIL: "no address of this machine; correct `interface` in coordinator.yaml",
    errno.EACCES: "ports below 1024 are not for every user; choose another in coordinator.yaml",
}


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
        config = self.config
        try:
            listening = [
                _listen(family, address, config.backlog) for family, address in _found(config.host, config.port)
            ]
        except OSError as error:
            logger.error("%s", _refused(config.host, config.port, error))  # noqa: TRY400
            await self.lifespan.shutdown()
            raise SystemExit(1) from error
        self.config.loaded_app = _in_time(self.config.loaded_app, self._watch.limits.reading_seconds)
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
            place = Place(peer[:2])
            if not self._watch.admit(place, loop.time()):
                connection.close()
                continue
            place.give_up = self._start(self._hand_over(place, connection)).cancel

    async def _hand_over(self, place: Place, connection: socket.socket) -> None:
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

    def _protocol(self, place: Place, loop: asyncio.AbstractEventLoop) -> asyncio.Protocol:
        kind = _watched(cast("Any", self.config.http_protocol_class))
        protocol: Any = kind(
            config=self.config,
            server_state=self.server_state,
            app_state={**self.lifespan.state, PLACE: place},
            _loop=loop,
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
        place: Place

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


def _in_time(application: Application, seconds: float) -> Application:
    """``application``, whose answers end with their connection when a peer does not take a piece in ``seconds``."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        place: Place = scope["state"][PLACE]

        async def send_in_time(message: Scope) -> None:
            try:
                async with asyncio.timeout(seconds):
                    await send(message)
            except TimeoutError:
                # What is sent from now on goes nowhere, and the application comes to its end.
                place.close()

        await application(scope, receive, send_in_time)

    return answer


def require_free(host: str, port: int) -> None:
    """Return if one may listen on ``port`` of ``host`` now.

    Looked at before anything is begun: two servers of which one cannot listen end each other with all their traces.

    Raises:
        SystemExit: another process does, or one may not; the log has it in a line.
    """
    try:
        for family, address in _found(host, port):
            _bound(family, address).close()
    except OSError as error:
        logger.error("%s", _refused(host, port, error))  # noqa: TRY400 - the line says it all
        raise SystemExit(1) from error


def _refused(host: str, port: int, error: OSError) -> str:
    """One line for who started it; begins with CANNOT_LISTEN, by which it is found again in a log."""
    advice = _ADVICE.get(error.errno or 0, "see `interface` and the ports in coordinator.yaml")
    return f"{CANNOT_LISTEN} {host} port {port}: {error.strerror or error}; {advice}"


def _found(host: str, port: int) -> list[tuple[int, Any]]:
    """Families and addresses that ``host`` stands for; a name is looked up, once, at the start."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [(family, address) for family, _, _, _, address in found]


def _listen(family: int, address: Any, backlog: int) -> socket.socket:
    listening = _bound(family, address)
    listening.listen(backlog)
    listening.setblocking(False)
    return listening


def _bound(family: int, address: Any) -> socket.socket:
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
