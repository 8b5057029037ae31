"""A coordinator's documents whose truth is elsewhere, with copies in its folder for whoever reads files.

The folder's readers (the verifier, the report, the SuperLink that serves, an operator's own eyes) work offline on
files, on purpose. So everything but checkpoints is copied there: after it was kept, and before the coordinator's ledger
speaks of it.
"""

import fcntl
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from fedgrade.federation.store import MAX_KEPT_BYTES, Documents, Folder
from fedgrade.trust.canonical import digest

EVERYTHING: Final = ("coordinator", "jobs")
_KEPT: Final = re.compile(
    r"coordinator/(?:(?:enrolment|job|patience)\.json|(?:witnessed|left)/[^/]+)"
    r"|jobs/[^/]+/(?:checkpoint|receipts|evaluation|release)/.+"
)
_CHECKPOINT: Final = re.compile(r"jobs/[^/]+/checkpoint/.+")


class Digested(Documents, Protocol):
    """Documents whose digests are known without reading them."""

    def digests(self, folder: str) -> dict[str, str]:
        """The SHA-256 of every document below ``folder``, or of all, by name."""


class Mirror:
    """Documents kept in ``truth``, which alone is believed, and copied into the folder ``root``."""

    def __init__(self, truth: Digested, root: Path) -> None:
        self._truth = truth
        self._root = root
        self._copies = Folder(root)

    def read(self, name: str, *, limit: int = MAX_KEPT_BYTES) -> bytes | None:
        """What ``name`` holds."""
        return self._truth.read(name, limit=limit)

    def names(self, folder: str) -> tuple[str, ...]:
        """Every name below ``folder``."""
        return self._truth.names(folder)

    def write(self, changes: Mapping[str, bytes | None]) -> None:
        """Let each name hold its bytes, or nothing; then copy. A crash in between is made good by the next process."""
        self._truth.write(changes)
        with self._alone():
            self._copies.write({name: content for name, content in changes.items() if _is_copied(name)})

    def where(self, name: str) -> str:
        """Where the truth is."""
        return self._truth.where(name)

    def bring_up_to_date(self, folders: Collection[str] = EVERYTHING) -> None:
        """Let the copies below ``folders`` be what is kept, and nothing else of the jobs that are kept.

        Raises:
            DocumentRefused: what is kept was changed by others.
        """
        with self._alone():
            for folder in folders:
                kept = {name: found for name, found in self._truth.digests(folder).items() if _is_copied(name)}
                for name, expected in kept.items():
                    standing = self._copies.read(name)
                    if standing is None or digest(standing) != expected:
                        self._copies.write({name: self._truth.read(name)})
                jobs = {_job(name) for name in kept}
                copied = [name for name in self._copies.names(folder) if _is_copied(name) and _job(name) in jobs]
                self._copies.write(dict.fromkeys(name for name in copied if name not in kept))

    def in_folder(self) -> Iterator[tuple[str, bytes]]:
        """Everything in the folder that belongs to the documents, one after the other."""
        for folder in EVERYTHING:
            for name in filter(_KEPT.fullmatch, self._copies.names(folder)):
                if (content := self._copies.read(name)) is not None:
                    yield name, content

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process copies meanwhile: the older copy could be the one that stays."""
        with (self._root / "coordinator" / "copies.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_copied(name: str) -> bool:
    """Whether readers of files may want ``name``: all want evidence, and nobody the arrays that a run resumes from."""
    return bool(_KEPT.fullmatch(name)) and not _CHECKPOINT.fullmatch(name)


def _job(name: str) -> str:
    """The folder of the job that ``name`` belongs to; that of all others is one."""
    first, second, *_ = name.split("/")
    return second if first == "jobs" else first
