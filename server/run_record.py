"""What a coordinator's folder says of each of its runs: how far it came, how it ended. It proves nothing.

``jobs/<job>/run.json``, written by who submits the job, then by the process that runs it, and by ``fedgrade serve``,
which takes up a run that left it open, while no process runs it. ``jobs/<job>/stop.json``, beside it, is the word of
``fedgrade stop``, which may come at any time: while it lies there nobody takes the run up, and a process that runs it
ends after its stage. Each is on the disk before anything is done that relies on it. Ledgers and releases are what can
be proved.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from fedgrade.errors import FedgradeError, StoreUnavailable
from fedgrade.federation.rounds import stages_of
from fedgrade.federation.store import write_durably
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.enrolment import utc_text

logger = logging.getLogger(__name__)

NAME: Final = "run.json"
STOP: Final = "stop.json"
Outcome = Literal["", "released", "failed", "stopped"]
_MAX_WHY: Final = 2000  # characters


class RunStopped(FedgradeError):
    """Somebody said that this run is to stop; ``why`` is by whose word."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the run was stopped {why}; its checkpoint stands")
        self.why = why


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
        tries: how often it was taken up since it last finished a stage, or a person let it go on.
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
    tries: int


@dataclass(frozen=True, kw_only=True)
class StopOrder:
    """The run of a job is to stop: since when (UTC), and by whose word."""

    asked: str
    why: str


class RunKeeper:
    """Keeps the record of the run of one job. A disk that is full stops no run; a word that it is to stop does."""

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
            tries=known.tries if known else 0,
        )
        self._put()

    def stage(self, done: int) -> None:
        """So many stages are finished.

        Raises:
            RunStopped: this was the last for now.
        """
        self._record = replace(self._record, done=done, changed=utc_text(datetime.now(UTC)), tries=0)
        self._put()
        if done < self._record.stages:
            self.may_go_on()

    def may_go_on(self) -> None:
        """Return if nobody said that the run is to stop.

        Raises:
            RunStopped: somebody did.
        """
        if order := _read_order(self._folder):
            raise RunStopped(order.why)

    def end(self, outcome: Outcome, why: str = "") -> None:
        """The run is over."""
        changed = utc_text(datetime.now(UTC))
        self._record = replace(self._record, outcome=outcome, why=why[:_MAX_WHY], changed=changed)
        self._put()

    def put_back(self, record: RunRecord) -> None:
        """Nothing came of going on: ``record`` stands again."""
        self._record = record
        self._put()

    def _put(self) -> None:
        try:
            _write(self._folder, self._record)
        except OSError as error:
            logger.warning("%s: not written (%s)", self._folder / NAME, error.strerror)


@contextmanager
def recorded(folder: Path, job: TrainingJob) -> Iterator[RunKeeper]:
    """A keeper of the record in the job's ``folder``, which also says how the block ended.

    Raises:
        RunStopped: the run is to stop, or was to before it began.
    """
    keeper = RunKeeper(folder, job)
    try:
        keeper.may_go_on()
        yield keeper
    except RunStopped as error:
        keeper.end("stopped", error.why)
        raise
    except Exception as error:
        keeper.end("failed", str(error) if isinstance(error, FedgradeError) else f"{type(error).__name__}: {error}")
        raise
    # Who is interrupted leaves the record as that of a run that goes on: it is to be taken up again.
    keeper.end("released")


@contextmanager
def begun(folder: Path, job: TrainingJob) -> Iterator[None]:
    """A record lies open in the job's ``folder`` before anything is submitted in the block, and stays so.

    So a run whose process dies before it can write one itself is one that was interrupted. Where the block fails, the
    record is what it was before, or says that nothing was begun.
    """
    before = read_record(folder)
    keeper = RunKeeper(folder, job)
    try:
        yield
    except FedgradeError as error:
        if before is None:
            keeper.end("failed", f"was not begun: {error}")
        else:
            keeper.put_back(before)
        raise


def order_stop(folder: Path, why: str) -> None:
    """From now on the run of the job in ``folder`` is to stop, whoever takes it up, until :func:`let_go_on`.

    Raises:
        StoreUnavailable: it could not be written; the run goes on.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / STOP, encode(StopOrder(asked=utc_text(datetime.now(UTC)), why=why)))
    except OSError as error:
        raise StoreUnavailable(
            f"{folder / STOP}: cannot be written ({error.strerror}); nothing was stopped, make room and try again"
        ) from error


def let_go_on(folder: Path, *, on: bool) -> None:
    """A person lets the run of the job in ``folder`` go on: neither stopped, nor tried too often.

    Args:
        folder: of the job.
        on: whether a process runs it now, which keeps the record itself.

    Raises:
        StoreUnavailable: it could not be written.
    """
    try:
        (folder / STOP).unlink(missing_ok=True)
        record = read_record(folder)
        if not on and record is not None and record.tries:
            _write(folder, replace(record, tries=0))
    except OSError as error:
        raise StoreUnavailable(f"{folder}: cannot be written ({error.strerror})") from error


def note_try(folder: Path, record: RunRecord) -> None:
    """The run of ``record``, which no process runs now, is about to be taken up once more.

    Raises:
        OSError: it could not be written.
    """
    _write(folder, replace(record, tries=record.tries + 1))


def note_given_up(folder: Path, record: RunRecord, why: str) -> None:
    """The run of ``record``, which no process runs now, is left to a person.

    Raises:
        OSError: it could not be written.
    """
    _write(folder, replace(record, outcome="failed", why=why[:_MAX_WHY], changed=utc_text(datetime.now(UTC))))


def read_record(folder: Path) -> RunRecord | None:
    """The record in the job's ``folder``; None where there is none that can be read.

    A run that did not say how it ended, and that somebody told to stop, was stopped.
    """
    try:
        record = decode(RunRecord, (folder / NAME).read_bytes(), what=f"{folder / NAME}")
    except FileNotFoundError:
        return None
    except (OSError, FedgradeError) as error:
        logger.warning("%s", error)
        return None
    if not record.outcome and (order := _read_order(folder)):
        return replace(record, outcome="stopped", why=order.why, changed=max(record.changed, order.asked))
    return record


def _read_order(folder: Path) -> StopOrder | None:
    """Who said that the run is to stop; an order that cannot be read is one."""
    path = folder / STOP
    try:
        return decode(StopOrder, path.read_bytes(), what=f"{path}")
    except FileNotFoundError:
        return None
    except (OSError, FedgradeError) as error:
        logger.warning("%s", error)
        return StopOrder(asked="", why=f"{path} cannot be read")


def _write(folder: Path, record: RunRecord) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / NAME, encode(record))
