"""Every job that a coordinator's folder knows, and how each ended. Reads files alone; no SuperLink need run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fedgrade.errors import FedgradeError
from fedgrade.federation.release import open_release
from fedgrade.federation.rounds import stages_of
from fedgrade.job import TrainingJob
from fedgrade.trust.file_lock import is_held
from fedgrade.trust.identity import PublicKey
from server.coordinator_folder import CoordinatorFolder
from server.run_record import RunRecord, read_record

State = Literal["released", "on", "stopped", "failed", "interrupted", "not begun", "unknown"]
DIGITS: Final = 16  # of a digest, as the folders of jobs are named
_KILLED: Final = "its process was ended; `fedgrade serve` goes on with it, or `fedgrade resume`"
_REPLACED: Final = "its process was ended, and another job took its place"


@dataclass(frozen=True, kw_only=True)
class KnownRun:
    """One job of a folder; what is not known of it is empty, or 0.

    Attributes:
        job: its digest, or the first digits of it.
        name: what the coordinator called it.
        began: when it was begun (UTC).
        changed: when its last stage was finished, or it ended (UTC).
        done: stages that are finished.
        stages: stages that it has.
        epsilon: what it may cost an item, as planned.
        state: how it stands.
        why: in words, where it failed, was stopped or interrupted.
    """

    job: str
    name: str = ""
    began: str = ""
    changed: str = ""
    done: int = 0
    stages: int = 0
    epsilon: float = 0.0
    state: State = "unknown"
    why: str = ""


def known_runs(folder: CoordinatorFolder) -> tuple[KnownRun, ...]:
    """Every job of ``folder``, the newest first.

    Raises:
        DocumentRefused, SignatureRefused: the job that is on cannot be read.
    """
    current, coordinator = current_job(folder), folder.read_roster().coordinator
    runs = {path.name: _known(path, folder, current, coordinator) for path in sorted(folder.root.glob("jobs/*"))}
    if current is not None and current.digest[:DIGITS] not in runs:
        runs[current.digest[:DIGITS]] = _begins(folder, current)
    # The job that was put there last may not have begun, and has no time yet.
    return tuple(sorted(runs.values(), key=lambda run: (run.state in {"on", "not begun"}, run.began), reverse=True))


def current_job(folder: CoordinatorFolder) -> TrainingJob | None:
    """The job that is on in ``folder``, or was last; None where there never was one.

    Raises:
        DocumentRefused, SignatureRefused: it cannot be read.
    """
    return folder.read_job() if folder.current_job.exists() else None


def state_of_current(folder: CoordinatorFolder, job: TrainingJob) -> KnownRun:
    """How the run of ``job``, which :func:`current_job` gave, stands now."""
    record = read_record(folder.job_folder(job))
    return _begins(folder, job) if record is None else _recorded(record, folder, current=job)


def _known(path: Path, folder: CoordinatorFolder, current: TrainingJob | None, coordinator: PublicKey) -> KnownRun:
    if record := read_record(path):
        return _recorded(record, folder, current=current)
    if current is not None and current.digest[:DIGITS] == path.name:
        return _begins(folder, current)
    return _of_release(path, coordinator)


def _recorded(record: RunRecord, folder: CoordinatorFolder, *, current: TrainingJob | None) -> KnownRun:
    state: State = record.outcome or "interrupted"
    why = record.why
    if record.outcome in {"", "stopped"}:
        is_current = current is not None and current.digest == record.job
        # What was told to stop is on until its process has ended.
        if is_current and (is_held(folder.ledger) if record.outcome else is_on(folder)):
            state, why = "on", ""
        elif not record.outcome:
            state, why = "interrupted", _KILLED if is_current else _REPLACED
    return KnownRun(
        job=record.job,
        name=record.name,
        began=record.began,
        changed=record.changed,
        done=record.done,
        stages=record.stages,
        epsilon=record.epsilon,
        state=state,
        why=why,
    )


def _begins(folder: CoordinatorFolder, job: TrainingJob) -> KnownRun:
    """A job that was put into the folder, of whose run there is no record yet."""
    return KnownRun(
        job=job.digest,
        name=job.spec.name,
        stages=len(stages_of(job)),
        epsilon=float(job.plan.target_epsilon),
        state="on" if is_on(folder) else "not begun",
    )


def _of_release(path: Path, coordinator: PublicKey) -> KnownRun:
    """What the release in a job's folder says of it; from before records were kept."""
    try:
        release = open_release(path / "release", signed_by=coordinator).release
    except FedgradeError:
        return KnownRun(job=path.name)
    stages, published = len(stages_of(release.job)), release.published
    return KnownRun(
        job=release.job.digest,
        name=release.job.spec.name,
        began=published,
        changed=published,
        done=stages,
        stages=stages,
        epsilon=float(release.job.plan.target_epsilon),
        state="released",
    )


def is_on(folder: CoordinatorFolder) -> bool:
    """Whether a process runs a job in ``folder``, or is about to: whoever submits one holds a lock until it is over."""
    return is_held(folder.ledger) or is_held(folder.root / "coordinator" / "run.lock")
