"""What a coordinator's folder says of each of its runs: how far it came, how it ended. It proves nothing.

``jobs/<job>/run.json``, written by the process that runs the job: for people, and for ``fedgrade serve``, which takes
up a run that left it open. Ledgers and releases are what can be proved.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from fedgrade.errors import FedgradeError
from fedgrade.federation.rounds import stages_of
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.enrolment import utc_text

logger = logging.getLogger(__name__)

NAME: Final = "run.json"
Outcome = Literal["", "released", "failed", "stopped"]
_MAX_WHY: Final = 2000  # characters


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        schema: of this document.
        job: its digest.
        name: what the coordinator called it.
        epsilon: what it may cost an item, as planned.
        stages: how many it has.
        done: how many of them are finished.
        began: when it was first begun (UTC).
        changed: when its last stage was finished, or it ended (UTC).
        outcome: how it ended; empty while it goes on, and where its process had no time to say.
        why: in words, where it failed or was stopped.
    """

    schema: Literal["fedgrade/run/1"] = "fedgrade/run/1"
    job: str
    name: str
    epsilon: float
    stages: int
    done: int
    began: str
    changed: str
    outcome: Outcome
    why: str


class RunKeeper:
    """Keeps the record of the run of one job. A disk that is full stops no run."""

    def __init__(self, folder: Path, job: TrainingJob) -> None:
        """Begin the record in the job's ``folder``, or go on with the one that is there."""
        now = utc_text(datetime.now(UTC))
        known = read_record(folder)
        self._folder = folder
        self._record = RunRecord(
            job=job.digest,
            name=job.spec.name,
            epsilon=float(job.plan.target_epsilon),
            stages=len(stages_of(job)),
            done=known.done if known else 0,
            began=known.began if known else now,
            changed=known.changed if known else now,
            outcome="",
            why="",
        )
        self._put()

    def stage(self, done: int) -> None:
        """So many stages are finished."""
        self._record = replace(self._record, done=done, changed=utc_text(datetime.now(UTC)))
        self._put()

    def end(self, outcome: Outcome, why: str = "") -> None:
        """The run is over."""
        changed = utc_text(datetime.now(UTC))
        self._record = replace(self._record, outcome=outcome, why=why[:_MAX_WHY], changed=changed)
        self._put()

    def _put(self) -> None:
        try:
            _write(self._folder, self._record)
        except OSError as error:
            logger.warning("%s: not written (%s)", self._folder / NAME, error.strerror)


@contextmanager
def recorded(folder: Path, job: TrainingJob) -> Iterator[RunKeeper]:
    """A keeper of the record in the job's ``folder``, which also says how the block ended."""
    keeper = RunKeeper(folder, job)
    try:
        yield keeper
    except Exception as error:
        keeper.end("failed", str(error) if isinstance(error, FedgradeError) else f"{type(error).__name__}: {error}")
        raise
    # Who is interrupted leaves the record as that of a run that goes on: it is to be taken up again.
    keeper.end("released")


def note_stopped(folder: Path, why: str) -> None:
    """Say in the job's ``folder`` that its run was stopped, unless the run itself said how it ended."""
    record = read_record(folder)
    if record is not None and not record.outcome:
        _write(folder, replace(record, outcome="stopped", why=why, changed=utc_text(datetime.now(UTC))))


def read_record(folder: Path) -> RunRecord | None:
    """The record in the job's ``folder``; None where there is none that can be read."""
    try:
        return decode(RunRecord, (folder / NAME).read_bytes(), what=f"{folder / NAME}")
    except FileNotFoundError:
        return None
    except (OSError, FedgradeError) as error:
        logger.warning("%s", error)
        return None


def _write(folder: Path, record: RunRecord) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{NAME}.part"
    draft.write_bytes(encode(record))
    draft.replace(folder / NAME)
