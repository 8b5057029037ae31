"""A coordinator's folder, and the run of the job that lies in it. The same for a deployment, a simulation, a process.

The folder: ``roster.json``; ``coordinator/`` with its key, its ledger, what it saw of others' ledgers, the sealed job
that is on and the progress of it; ``jobs/<job>/`` with checkpoint, receipts and release.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedgrade.errors import JobRefused
from fedgrade.federation.exchange import Cohort
from fedgrade.federation.rounds import Coordinator, Progress, RoundLog, run_job
from fedgrade.federation.store import RunStore, write_durably
from fedgrade.federation.witness import Witness
from fedgrade.job import TrainingJob
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import Roster, SigningKey, read_roster
from fedgrade.trust.ledger import LedgerWriter

logger = logging.getLogger(__name__)

STAGE_DEADLINE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class CoordinatorFolder:
    """Where a coordinator keeps everything; paths only, nothing is read at birth."""

    root: Path

    @property
    def roster(self) -> Path:
        """Who is who."""
        return self.root / "roster.json"

    @property
    def key(self) -> Path:
        """The coordinator's signing key."""
        return self.root / "coordinator" / "key.pem"

    @property
    def ledger(self) -> Path:
        """The coordinator's own ledger."""
        return self.root / "coordinator" / "ledger.jsonl"

    @property
    def witnessed(self) -> Path:
        """The newest head of each site's ledger that the coordinator has seen."""
        return self.root / "coordinator" / "witnessed"

    @property
    def current_job(self) -> Path:
        """The sealed job that is on, or was last."""
        return self.root / "coordinator" / "job.json"

    @property
    def progress(self) -> Path:
        """One line a finished stage of the job that is on."""
        return self.root / "coordinator" / "progress.jsonl"

    def job_folder(self, job: TrainingJob) -> Path:
        """Checkpoint, receipts and release of ``job``."""
        return self.root / "jobs" / job.digest[:16]

    def read_roster(self) -> Roster:
        """The roster.

        Raises:
            DocumentRefused: it cannot be read.
        """
        return read_roster(self.roster)

    def put_job(self, job: TrainingJob) -> None:
        """Seal ``job`` and make it the one that is on."""
        write_durably(self.current_job, seal(job, SigningKey.load(self.key)))
        self.progress.write_bytes(b"")

    def read_job(self) -> TrainingJob:
        """The job that is on.

        Raises:
            JobRefused: none was put there.
            SignatureRefused: it was not sealed by this coordinator.
        """
        if not self.current_job.exists():
            raise JobRefused(f"{self.current_job}: no job here; start one with `fedgrade run`")
        coordinator = SigningKey.load(self.key).public
        return open_sealed(self.current_job.read_bytes(), as_=TrainingJob, signed_by=coordinator)


def coordinate(run_directory: Path, cohort: Cohort) -> None:
    """Run the job that lies in ``run_directory`` to its release, from wherever its checkpoint stands."""
    folder = CoordinatorFolder(root=run_directory)

    def report(progress: Progress) -> None:
        with folder.progress.open("ab") as file:
            file.write(json.dumps(asdict(progress)).encode() + b"\n")

    run_folder(folder, cohort, report=report)


def run_folder(folder: CoordinatorFolder, cohort: Cohort, *, report: Callable[[Progress], None]) -> str:
    """Run the job in ``folder`` with ``cohort``; returns the digest of the signed release."""
    job, key = folder.read_job(), SigningKey.load(folder.key)
    coordinator = Coordinator(
        key=key,
        witness=Witness(folder.witnessed, roster=folder.read_roster()),
        clock=lambda: datetime.now(UTC),
        report=report,
        deadline_seconds=STAGE_DEADLINE_SECONDS,
    )
    log = RoundLog.open(
        lambda observe: LedgerWriter.open(folder.ledger, key=key, observe=observe), now=datetime.now(UTC)
    )
    try:
        return run_job(job, cohort, coordinator=coordinator, store=RunStore(folder.job_folder(job)), log=log)
    finally:
        log.close()
