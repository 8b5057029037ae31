"""A Unix socket that lets in this user's processes alone, by the kernel's word, and carries their bytes further.

gRPC has no peer credentials for a Unix socket: what its local credentials prove is that the connection is local. So the
socket that people and bundles find is ours: whoever connects is known by SO_PEERCRED (unix(7)) before one of its bytes
is read, and gRPC listens in a folder behind it. Where the kernel has no such word (macOS), the folders' modes remain.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final, Self

from fedgrade.errors import DocumentRefused

logger = logging.getLogger(__name__)

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid: struct ucred
_CHUNK: Final = 2**20
_CLOSE_SECONDS: Final = 1.0  # for bytes that nobody takes any more
_ROOT: Final = 0
_UP_SECONDS: Final = 30.0  # a machine with no free files or threads fails at once; one that swaps takes its time


def peer_user(connection: Any) -> int | None:
    """The user whose process holds the other end of the Unix socket ``connection``; None where no kernel says."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size))
    return int(user)


def own_user_or_root(user: int | None) -> bool:
    """Whether ``user`` may speak to this process; root reads its memory anyway."""
    return user is None or user in {_ROOT, os.geteuid()}


class OwnUserDoor:
    """Listens at ``path`` and carries each connection to the socket at ``inner``; a context manager."""

    def __init__(self, path: Path, inner: Path, *, admits: Callable[[int | None], bool] = own_user_or_root) -> None:
        self._path = path
        self._inner = inner
        self._admits = admits
        self._up = threading.Event()
        self._failure: OSError | RuntimeError | None = None
        # The loop itself holds tasks weakly: one whose two ends are both quiet could be collected half-way.
        self._under_way: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="agent-door", daemon=True)

    def __enter__(self) -> Self:
        """Listen.

        Raises:
            DocumentRefused: the socket cannot be made, or nobody came to listen at it.
        """
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(str(self._path))
        except OSError as error:
            self._listener.close()
            raise DocumentRefused(f"socket {self._path}: cannot be opened ({error.strerror})") from error
        # Nobody can connect before somebody listens.
        self._path.chmod(0o600)
        try:
            self._begin()
        except (OSError, RuntimeError) as error:
            # A thread that comes too late finds its socket closed, and ends.
            self._listener.close()
            self._path.unlink(missing_ok=True)
            raise DocumentRefused(f"socket {self._path}: nobody listens at it ({error}); start again") from error
        return self

    def __exit__(self, *_exception: object) -> None:
        """Listen no more; what is under way is cut off."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Start the thread, and return once it listens.

        Raises:
            OSError, RuntimeError: it does not.
        """
        self._thread.start()
        if not self._up.wait(_UP_SECONDS):
            raise TimeoutError(f"its thread took over {_UP_SECONDS:g} s")
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._serve())
        except (OSError, RuntimeError) as error:
            self._failure = error
        finally:
            self._up.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_unix_server(self._carry, sock=self._listener, limit=_CHUNK)
        self._up.set()
        await self._stop.wait()
        server.close()
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        # What was closed is gone after one more turn of the loop.
        await asyncio.sleep(0)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carried(reader, writer))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        # Cut off when the door closes, which is no failure.
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _carried(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with _closed_after(writer):
            user = peer_user(writer.get_extra_info("socket"))
            if not self._admits(user):
                logger.warning("socket %s: a process of user %s was turned away", self._path, user)
                return
            try:
                further_reader, further_writer = await asyncio.open_unix_connection(str(self._inner), limit=_CHUNK)
            except OSError as error:
                logger.debug("socket %s: %s", self._inner, error)
                return
            async with _closed_after(further_writer):
                with contextlib.suppress(ExceptionGroup):
                    async with asyncio.TaskGroup() as both:
                        both.create_task(_pump(reader, further_writer))
                        both.create_task(_pump(further_reader, writer))


@contextlib.asynccontextmanager
async def _closed_after(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """``writer`` is closed when the block ends, and how its connection ended is heard: else asyncio logs it later."""
    try:
        yield
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await writer.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Every byte from ``reader`` to ``writer``, and the end.

    Raises:
        OSError: one of them was reset.
    """
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
