"""A job for the SuperLink that serves, and for partners on machines of their own: ``fedgrade run`` and ``resume``.

The run belongs to the SuperLink: whoever submitted it may leave, and somebody else may follow it.
"""

import logging
import math
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from rich.console import Console

from fedgrade.errors import JobRefused
from fedgrade.federation.release import open_release
from fedgrade.federation.rounds import stages_of
from fedgrade.job import TrainingJob, plan_job
from fedgrade.trust.file_lock import is_held
from fedgrade.trust.identity import SiteId
from server.app import RUN_DIRECTORY
from server.attached import attached, is_served, wait_for_end
from server.configure import compose_job
from server.control import Control, ControlRefused
from server.coordinator_folder import CoordinatorFolder, Patience
from server.deployment import DeploymentFailed
from server.engines import followed
from server.enrolment import read_book
from server.local_federation import LocalFederation
from server.nodes_file import read_nodes
from server.progress_board import progress_board
from server.run_lock import run_lock
from server.run_record import begun, let_go_on, read_record
from server.summary import announce, quality_table

logger = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 0.5
_READER_SECONDS: Final = 5.0
# For `fedgrade serve` to see that a run's process is gone, for sites to come back, and to submit the run again.
_TAKEN_UP_SECONDS: Final = 120.0


def run_served(console: Console, root: Path, *, overrides: tuple[str, ...], patience: Patience) -> None:
    """Submit a job to the SuperLink that serves ``root``, and follow it to its end.

    Raises:
        NotServing: no SuperLink serves ``root``.
        JobRefused: a run is on, the job is impossible, or too few partners are online.
        DeploymentFailed: the run failed or was stopped; its checkpoint stands.
    """
    folder = CoordinatorFolder(root=root)
    with attached(root) as control, run_lock(root):
        if going := control.unfinished():
            raise JobRefused(
                f"{root}: run {going[0]} is on; follow it with `fedgrade resume {root}`, or end it with `fedgrade stop "
                f"{root}`"
            )
        job = _new_job(folder, overrides)
        _require_online(console, control, job, root)
        folder.put_job(job, patience)
        _to_its_end(console, control, _submitted(control, folder, job), folder, job)
    _tell(console, folder, job)


def resume_served(console: Console, root: Path, *, deadline: float | None = None, wait: float | None = None) -> None:
    """Take up the job that lies in ``root``, or the run of it that is on, and follow it to its end.

    A ``deadline`` or ``wait`` in seconds is for the next process that runs it; without them it keeps what it had.

    Raises:
        NotServing: no SuperLink serves ``root``.
        JobRefused: there is no job, somebody follows it already, or the process of the run before has not ended.
        DeploymentFailed: the run failed or was stopped; its checkpoint stands.
    """
    folder = CoordinatorFolder(root=root)
    with attached(root) as control, run_lock(root):
        going, job = control.unfinished(), folder.read_job()
        folder.renew_patience(deadline_seconds=deadline, admission_seconds=wait)
        if going and not is_held(folder.ledger):
            # Of a SuperLink that was killed: it still counts the run, whose process is gone.
            control.stop(going[0])
            going = ()
        if not going and not wait_for_end(folder.ledger):
            raise JobRefused(f"{root}: the process of the run before has not ended yet; try again in a minute")
        record = read_record(folder.job_folder(job))
        let_go_on(folder.job_folder(job), on=bool(going))
        _to_its_end(console, control, going[0] if going else _submitted(control, folder, job), folder, job)
    if record is not None and record.outcome == "released":
        console.print("This job was released before; nobody was asked again.")
    _tell(console, folder, job)


def _submitted(control: Control, folder: CoordinatorFolder, job: TrainingJob) -> int:
    """The number of a new run of ``job``, which is taken up also if it is killed before it says that it has begun."""
    with begun(folder.job_folder(job), job):
        return control.submit({RUN_DIRECTORY: str(folder.root.resolve())})


def _to_its_end(console: Console, control: Control, run_id: int, folder: CoordinatorFolder, job: TrainingJob) -> None:
    announce(console, job)
    try:
        with progress_board(console, stages=len(stages_of(job))) as board:
            board.note(f"run {run_id}")
            with followed(LocalFederation(root=folder.root), board):
                _follow(control, run_id, folder, job)
    except KeyboardInterrupt:
        console.print(
            f"Run {run_id} goes on without you. See it with `fedgrade watch {folder.root}`, follow it to its end with "
            f"`fedgrade resume {folder.root}`, or end it with `fedgrade stop {folder.root}`."
        )
        raise


def declared_items(folder: CoordinatorFolder) -> dict[SiteId, int]:
    """What every enrolled site published of its size.

    Raises:
        DocumentRefused: a file cannot be read.
    """
    if folder.book.exists():
        return {site: body.declared_items for site, body in read_book(folder).membership.current.items()}
    return LocalFederation(root=folder.root).declared_items()


def _new_job(folder: CoordinatorFolder, overrides: tuple[str, ...]) -> TrainingJob:
    declared = declared_items(folder)
    if not declared:
        raise JobRefused(f"{folder.root}: nobody is enrolled; put a partner on the roster with `fedgrade enrol`")
    return plan_job(compose_job(list(overrides)), declared_items=declared, nonce=secrets.token_hex(16))


def _require_online(console: Console, control: Control, job: TrainingJob, root: Path) -> None:
    nodes, online = read_nodes(root), control.online()
    away = [site for site in job.participants if nodes.get(site) not in online]
    here, wanted = len(job.participants) - len(away), job.spec.aggregation.minimum_sites
    if here < wanted:
        raise JobRefused(
            f"{here} of {len(job.participants)} sites are online, aggregation.minimum_sites is {wanted}; wait for "
            f"{', '.join(away)}"
        )
    if away:
        console.print(f"Not online, and counted on nevertheless: {', '.join(away)}")


def _follow(control: Control, run_id: int, folder: CoordinatorFolder, job: TrainingJob) -> None:
    """Return when the run has completed.

    Raises:
        DeploymentFailed: it failed, was stopped, or its SuperLink ended.
    """
    reader = threading.Thread(target=_read_log, args=(control, run_id), daemon=True)
    reader.start()
    try:
        _watch(control, run_id, folder, job)
    finally:
        # Before the connection is closed: a reader that is left reads what is opened next under the same number.
        reader.join(_READER_SECONDS)


def _watch(control: Control, run_id: int, folder: CoordinatorFolder, job: TrainingJob) -> None:
    gone_since, root = math.inf, folder.root
    while True:
        try:
            status = control.status(run_id)
        except ControlRefused as error:
            if not is_served(root):
                raise DeploymentFailed(
                    f"run {run_id}: its SuperLink ended ({error}); start `fedgrade serve {root}` again, then `fedgrade "
                    f"resume {root}`"
                ) from error
            logger.info("%s", error)
            ended, run_id = _after_a_restart(control, run_id, folder, job)
            if ended:
                return
            gone_since = min(gone_since, time.monotonic())
            if time.monotonic() - gone_since > _TAKEN_UP_SECONDS:
                raise _not_taken_up(run_id, root) from error
        else:
            gone_since = math.inf
            if status.outcome == "completed":
                return
            if status.finished:
                further = _taken_up(control, folder.job_folder(job)) if status.outcome == "failed" else None
                if further is None:
                    raise _not_completed(run_id, status.outcome, status.details, folder, job)
                run_id = further
        time.sleep(_LOOK_SECONDS)


def _taken_up(control: Control, job_folder: Path) -> int | None:
    """The run that goes on in place of one whose process was killed; None if it said how it ended, or none does."""
    end = time.monotonic() + _TAKEN_UP_SECONDS
    while time.monotonic() < end:
        record = read_record(job_folder)
        if record is None or record.outcome:
            return None
        with suppress(ControlRefused):
            if going := control.unfinished():
                return going[0]
        time.sleep(_LOOK_SECONDS)
    return None


def _after_a_restart(control: Control, run_id: int, folder: CoordinatorFolder, job: TrainingJob) -> tuple[bool, int]:
    """Whether the run was released meanwhile, and its number: a SuperLink that was started again gives it another.

    Raises:
        DeploymentFailed: it failed or was stopped meanwhile.
    """
    with suppress(ControlRefused):
        if going := control.unfinished():
            return False, going[0]
    record = read_record(folder.job_folder(job))
    if record is not None and record.outcome in {"failed", "stopped"}:
        raise _not_completed(run_id, record.outcome, record.why, folder, job)
    return record is not None and record.outcome == "released", run_id


def _not_taken_up(run_id: int, root: Path) -> DeploymentFailed:
    return DeploymentFailed(
        f"run {run_id}: its SuperLink was started again, and in {_TAKEN_UP_SECONDS:.0f} s nobody took the run up; see "
        f"`fedgrade roster {root}` for who is online; its checkpoint stands, and `fedgrade resume {root}` goes on"
    )


def _not_completed(
    run_id: int, outcome: str, why: str, folder: CoordinatorFolder, job: TrainingJob
) -> DeploymentFailed:
    said = f"run {run_id} {outcome}: {why or 'no reason given'}"
    gone = set(read_book(folder).membership.former) if folder.book.exists() else set[SiteId]()
    if len(set(job.participants) - gone) < job.spec.aggregation.minimum_sites:
        # Who was revoked is so for good.
        names = ", ".join(sorted(gone & set(job.participants)))
        return DeploymentFailed(f"{said}; {names} revoked, too few are left: start another job with `fedgrade run`")
    return DeploymentFailed(f"{said}; its checkpoint stands, and `fedgrade resume {folder.root}` goes on from there")


def _read_log(control: Control, run_id: int) -> None:
    try:
        for part in control.logs(run_id):
            for line in part.splitlines():
                logger.debug("%s", line)
    except ControlRefused as error:
        logger.debug("log of run %d: %s", run_id, error)


def _tell(console: Console, folder: CoordinatorFolder, job: TrainingJob) -> None:
    release = folder.job_folder(job) / "release"
    opened = open_release(release, signed_by=folder.read_roster().coordinator)
    console.print(quality_table(opened.release.metrics, job))
    console.print(f"model release   {release}")
    console.print(
        "Give partners that folder; they verify it before use. To prove what was spent, ask them for copies of their "
        f"ledgers, put them at {folder.root}/sites/<site>/ledger.jsonl, and run `fedgrade verify {folder.root}`."
    )
