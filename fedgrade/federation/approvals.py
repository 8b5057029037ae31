"""Jobs that wait for a person at the partner: shown, then approved or declined, in files beside the ledger."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedgrade.errors import DocumentRefused, JobRefused, LedgerBroken, LedgerUnavailable, PolicyViolated, SiteWaits
from fedgrade.federation.store import write_durably
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import MAX_DOCUMENT_BYTES, decode, encode
from fedgrade.trust.envelope import open_sealed
from fedgrade.trust.identity import PublicKey

# A coordinator that keeps sending other jobs fills no disk.
MAX_WAITING = 32
Decision = Literal["waiting", "approved", "declined"]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One job as it was shown, and what a person said to it."""

    job_envelope: str
    decision: Decision


@dataclass(frozen=True, kw_only=True)
class AskedJob:
    """A job that a coordinator sealed, and what this site's operator said to it."""

    job: TrainingJob
    decision: Decision


class Approvals:
    """The jobs of one site that a person was asked about."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is made when the first job is asked about."""
        self._folder = folder

    def require(self, job: TrainingJob, envelope: str) -> None:
        """Return if a person approved ``job``, whose sealed form is ``envelope``; ask for it otherwise.

        Raises:
            SiteWaits: nobody has decided yet.
            PolicyViolated: it was declined, or too many jobs wait already.
            LedgerUnavailable: the question could not be written down.
        """
        path = self._folder / f"{job.digest}.json"
        if not path.exists():
            # Looked for and not decoded: one damaged file should keep no other job from being asked about.
            if sum(b'"decision":"waiting"' in path.read_bytes() for path in self._folder.glob("*.json")) >= MAX_WAITING:
                raise PolicyViolated(f"job {job.spec.name}: {MAX_WAITING} jobs wait for this site's operator already")
            self._write(path, _Asked(job_envelope=envelope, decision="waiting"))
        match self._read(path).decision:
            case "approved":
                return
            case "declined":
                raise PolicyViolated(f"job {job.spec.name}: was declined by this site's operator")
            case "waiting":
                raise SiteWaits(f"job {job.spec.name}: waits for this site's operator to approve it")

    def asked(self, *, coordinator: PublicKey) -> tuple[AskedJob, ...]:
        """Every job that was shown, those that wait first.

        Raises:
            LedgerBroken, SignatureRefused: a file is damaged, or by another coordinator.
        """
        jobs = [
            AskedJob(
                job=open_sealed(asked.job_envelope.encode(), as_=TrainingJob, signed_by=coordinator),
                decision=asked.decision,
            )
            for asked in self._read_all()
        ]
        return tuple(sorted(jobs, key=lambda asked: (asked.decision != "waiting", asked.job.spec.name)))

    def decide(self, job: TrainingJob, decision: Decision) -> None:
        """Put down what a person said to ``job``.

        Raises:
            JobRefused: it was never shown here.
            LedgerUnavailable: it could not be written.
        """
        path = self._folder / f"{job.digest}.json"
        if not path.exists():
            raise JobRefused(f"job {job.digest[:16]}: was never shown to this site")
        self._write(path, _Asked(job_envelope=self._read(path).job_envelope, decision=decision))

    def _read_all(self) -> list[_Asked]:
        return [self._read(path) for path in sorted(self._folder.glob("*.json"))]

    def _read(self, path: Path) -> _Asked:
        try:
            with path.open("rb") as file:
                return decode(_Asked, file.read(MAX_DOCUMENT_BYTES + 1), what=f"approval {path}")
        except OSError as error:
            raise LedgerBroken(f"approval {path}: cannot be read ({error.strerror})") from error
        except DocumentRefused as error:
            raise LedgerBroken(f"{error}; take the file away, and the job is asked about anew") from error

    def _write(self, path: Path, asked: _Asked) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(path, encode(asked))
        except OSError as error:
            raise LedgerUnavailable(f"approval {path}: could not be written ({error.strerror})") from error
