"""Where a coordinator keeps everything.

The folder: ``roster.json``; ``bundle.json`` for partners; ``coordinator/`` with its key, its ledger, the book of who
was enrolled, what it saw of others' ledgers, the sealed job that is on and the progress of it; ``jobs/<job>/`` with
checkpoint, receipts and release.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedgrade.errors import DocumentRefused, JobRefused, SignatureRefused
from fedgrade.federation.store import Documents, Folder
from fedgrade.job import TrainingJob
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import Roster, SigningKey, read_roster
from server.coordinator_file import FILES, NAME, read_settings

logger = logging.getLogger(__name__)

BOOK: Final = "coordinator/enrolment.json"
WITNESSED: Final = "coordinator/witnessed"
_JOB: Final = "coordinator/job.json"
_PATIENCE: Final = "coordinator/patience.json"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a run waits: for one stage's answers, and for sites that wait for a person before they take part."""

    deadline_seconds: float = 600.0
    admission_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.deadline_seconds < math.inf or not 0 <= self.admission_seconds < math.inf:
            raise JobRefused(
                f"patience: deadline of {self.deadline_seconds} s must be above 0, and {self.admission_seconds} s for "
                "admission at least 0"
            )

    def but(self, *, deadline_seconds: float | None, admission_seconds: float | None) -> "Patience":
        """The same but for what is given."""
        return Patience(
            deadline_seconds=self.deadline_seconds if deadline_seconds is None else deadline_seconds,
            admission_seconds=self.admission_seconds if admission_seconds is None else admission_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class CoordinatorFolder:
    """Where a coordinator keeps everything; paths only, nothing is read at birth."""

    root: Path

    @property
    def roster(self) -> Path:
        """Who is who."""
        return self.root / "roster.json"

    @property
    def bundle(self) -> Path:
        """What partners join with, signed; the newest."""
        return self.root / "bundle.json"

    @property
    def book(self) -> Path:
        """Who was enrolled and revoked; a federation on one machine has none."""
        return self.root / BOOK

    @property
    def key(self) -> Path:
        """The coordinator's signing key."""
        return self.root / "coordinator" / "key.pem"

    @property
    def ledger(self) -> Path:
        """The coordinator's own ledger."""
        return self.root / "coordinator" / "ledger.jsonl"

    @property
    def current_job(self) -> Path:
        """The sealed job that is on, or was last."""
        return self.root / _JOB

    @property
    def progress(self) -> Path:
        """One line a finished stage of the job that is on."""
        return self.root / "coordinator" / "progress.jsonl"

    @property
    def patience(self) -> Path:
        """How long the run that is on waits."""
        return self.root / _PATIENCE

    def job_folder(self, job: TrainingJob) -> Path:
        """Checkpoint, receipts and release of ``job``."""
        return self.root / self.job_name(job)

    def job_name(self, job: TrainingJob) -> str:
        """Below which name they are kept."""
        return f"jobs/{job.digest[:16]}"

    @contextmanager
    def kept(self, *, copies: Collection[str] = ("coordinator",)) -> Iterator[Documents]:
        """Where everything is kept that must outlive this machine: this folder, or the database that its settings name.

        Of what a database keeps, the folder has copies for whoever reads files: all but checkpoints. Write through
        this, and read the copies.

        Args:
            copies: below which names to bring the copies up to date first.

        Raises:
            DatabaseUnavailable: it cannot be used now, or another machine uses it.
        """
        if (address := self._database()) == FILES:
            yield Folder(self.root)
            return
        # Imported here: its driver is an extra that few need.
        from server.database import opened_mirror  # noqa: PLC0415

        federation = SigningKey.load(self.key).public
        with opened_mirror(address, root=self.root, federation=federation) as mirror:
            mirror.bring_up_to_date(copies)
            yield mirror

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Keep the database, if there is one, to this machine until the block ends, also when it restarts meanwhile.

        What is given raises ``server.database.UsedElsewhere`` once another machine has taken it over all the same.

        Raises:
            DatabaseUnavailable: it cannot be used now, or another machine uses it.
        """
        if (address := self._database()) == FILES:
            yield lambda: None
            return
        from server.database import opened  # noqa: PLC0415 - as above
        from server.hold import Hold  # noqa: PLC0415

        federation = SigningKey.load(self.key).public
        database = opened(address, root=self.root, federation=federation, patience_seconds=0.0)
        with database, Hold(database) as hold:
            yield hold.require

    def _database(self) -> str:
        return read_settings(self.root).database if (self.root / NAME).exists() else FILES

    def read_roster(self) -> Roster:
        """The roster.

        Raises:
            DocumentRefused: it cannot be read.
        """
        return read_roster(self.roster)

    def put_job(self, job: TrainingJob, patience: Patience = Patience()) -> None:
        """Seal ``job`` and make it the one that is on, with so much ``patience``."""
        key = SigningKey.load(self.key)
        with self.kept() as kept:
            kept.write({_PATIENCE: seal(patience, key), _JOB: seal(job, key)})
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

    def put_patience(self, patience: Patience) -> None:
        """Let the next process that runs the job have this ``patience``."""
        with self.kept() as kept:
            kept.write({_PATIENCE: seal(patience, SigningKey.load(self.key))})

    def renew_patience(self, *, deadline_seconds: float | None, admission_seconds: float | None) -> Patience:
        """The patience of the job from now on: what it had but for what is given, the default if nobody signed it.

        Nothing is written where nothing changes: who only follows a run needs neither a database nor room on a disk.
        """
        before: Patience | None = None
        try:
            before = self.read_patience()
        except SignatureRefused as error:
            logger.warning("%s", error)
        known = before or Patience()
        patience = known.but(deadline_seconds=deadline_seconds, admission_seconds=admission_seconds)
        if patience != before:
            self.put_patience(patience)
        return patience

    def read_patience(self) -> Patience:
        """How long the run that is on waits.

        Raises:
            SignatureRefused: it is not what this coordinator signed.
        """
        if not self.patience.exists():
            return Patience()
        key = SigningKey.load(self.key).public
        try:
            return open_sealed(self.patience.read_bytes(), as_=Patience, signed_by=key, what="patience")
        except (DocumentRefused, SignatureRefused) as error:
            raise SignatureRefused(
                f"{self.patience}: was not signed by this coordinator ({key.fingerprint}), and nobody is asked by it; "
                f"`fedgrade resume` writes it anew ({error})"
            ) from error
