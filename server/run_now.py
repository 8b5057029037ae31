"""Whom the run that is on waits for at this moment, and what sites said no with: for ``fedgrade watch``.

Two small files, each replaced as a whole. They are a convenience: nothing is decided by them, and a disk that is full
stops no run.
"""

import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from fedgrade.errors import FedgradeError
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.enrolment import utc_text
from fedgrade.trust.identity import SiteId

logger = logging.getLogger(__name__)

AWAITED: Final = "awaited.json"
REFUSALS: Final = "refusals.json"
_AT_MOST_EVERY_SECONDS: Final = 0.2
_MAX_WORDS: Final = 300  # characters of a refusal
_MAX_BYTES: Final = 4 * 2**20

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The last thing that a site refused with, or why it was put out; and when (UTC)."""

    time: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Awaited:
    """The question that is open: when it was first asked (UTC; empty before the first), and who has not answered."""

    asked: str = ""
    sites: tuple[SiteId, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refusals:
    """What each site that refused said last."""

    sites: dict[SiteId, Refused] = field(default_factory=dict)


class AwaitedFile:
    """Writes whom the run waits for into ``folder``: a question's beginning and end at once, the rest now and then."""

    def __init__(self, folder: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = folder / AWAITED
        self._clock = clock
        self._now = Awaited()
        self._written: Awaited | None = None
        self._at = -math.inf
        self.awaits(())

    def awaits(self, sites: Collection[SiteId]) -> None:
        """``sites`` are those that have not answered; told again and again while a question is open."""
        anew = bool(set(sites) - set(self._now.sites))
        self._now = Awaited(asked=utc_text(self._clock()) if anew else self._now.asked, sites=tuple(sorted(sites)))
        # Who was answered by everybody tells nothing more, and what is left in the file would stay there.
        at_once = anew or not sites or time.monotonic() - self._at >= _AT_MOST_EVERY_SECONDS
        if at_once and self._now != self._written:
            _write(self._path, self._now)
            self._written, self._at = self._now, time.monotonic()


class RefusalsFile:
    """Writes what sites refuse with into ``folder``; for one thread."""

    def __init__(self, folder: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = folder / REFUSALS
        self._clock = clock
        self._said: dict[SiteId, Refused] = {}
        _write(self._path, Refusals())

    def hears(self, site: SiteId, words: str) -> None:
        """``site`` refused, or was put out."""
        self._said[site] = Refused(time=utc_text(self._clock()), words=words[:_MAX_WORDS])
        _write(self._path, Refusals(sites=self._said))


def read_awaited(folder: Path) -> Awaited:
    """Whom the run waits for; nobody where that cannot be read."""
    return _read(Awaited, folder / AWAITED) or Awaited()


def read_refusals(folder: Path) -> Refusals:
    """What sites refused with; nothing where that cannot be read."""
    return _read(Refusals, folder / REFUSALS) or Refusals()


def _write(path: Path, document: Awaited | Refusals) -> None:
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_bytes(encode(document))
        draft.replace(path)
    except OSError as error:
        logger.debug("%s: %s", path, error)


def _read(as_: type[T], path: Path) -> T | None:
    try:
        with path.open("rb") as file:
            return decode(as_, file.read(_MAX_BYTES), limit=_MAX_BYTES)
    except (OSError, FedgradeError):
        return None
