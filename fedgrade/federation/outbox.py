"""Replies that have left or may have: asked again, the same bytes go out. Fresh noise would be a second release."""

import logging
import os
from pathlib import Path

from fedgrade.errors import LedgerUnavailable

logger = logging.getLogger(__name__)

KEPT_REPLIES = 256


class Outbox:
    """Sent replies on disk, by the digest of the request they answer."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder

    def find(self, request_digest: str) -> bytes | None:
        """The reply that answered the request with this digest, byte for byte, if there was one."""
        path = self._path(request_digest)
        return path.read_bytes() if path.exists() else None

    def keep(self, request_digest: str, reply: bytes) -> None:
        """Store ``reply`` durably, whole or not at all.

        Raises:
            LedgerUnavailable: the disk refused; the reply must not be sent, for it could not be repeated.
        """
        path = self._path(request_digest)
        temporary = path.with_suffix(".part")
        try:
            # Before the reply: one that is there without a mark was delivered.
            self._mark(request_digest).touch()
            with temporary.open("wb") as file:
                file.write(reply)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self._forget_oldest()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise LedgerUnavailable(f"outbox {path}: could not be written ({error.strerror})") from error

    def delivered(self, request_digest: str) -> None:
        """The reply has reached whoever carries it to the coordinator, who asks for no older one again.

        Nothing rests on this but what operators see.
        """
        reply = self._path(request_digest)
        if not reply.exists():
            return
        try:
            made = reply.stat().st_mtime_ns
            for mark in self._folder.glob("*.pending"):
                if mark.stat().st_mtime_ns <= made:
                    mark.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("outbox %s: %s", self._folder, error.strerror)

    @property
    def undelivered(self) -> int:
        """How many replies are kept that nobody was seen to take, nor a newer one; asked for again, they go out."""
        return sum(mark.with_suffix(".reply").exists() for mark in self._folder.glob("*.pending"))

    def _forget_oldest(self) -> None:
        """Keep the newest replies alone; a coordinator that asks for an older one is told to try a further attempt."""
        replies = sorted(self._folder.glob("*.reply"), key=lambda path: path.stat().st_mtime_ns)
        for path in replies[:-KEPT_REPLIES]:
            path.unlink(missing_ok=True)
            path.with_suffix(".pending").unlink(missing_ok=True)

    def _mark(self, request_digest: str) -> Path:
        return self._folder / f"{request_digest}.pending"

    def _path(self, request_digest: str) -> Path:
        return self._folder / f"{request_digest}.reply"
