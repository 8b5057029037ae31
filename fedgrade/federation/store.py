"""What a coordinator keeps of one run on disk: a checkpoint after every stage, receipts, and what was measured.

A crash loses at most the stage that was open; asking for it again costs sites nothing, because they resend.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedgrade.aggregation.mean import ServerState
from fedgrade.aggregation.secure_sum.documents import SumTerms
from fedgrade.aggregation.secure_sum.evidence import SumEvidence
from fedgrade.errors import DocumentRefused, ModelRefused
from fedgrade.evaluation import ConfusionCounts
from fedgrade.job import TrainingJob
from fedgrade.model.weights import read_weights, write_weights
from fedgrade.trust.canonical import decode, digest, encode
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import Purpose, RoundClosed


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands: ``next_stage`` counts the stages done; arrays are the coordinator's own, all public.

    ``closing`` is what the coordinator's ledger is to say of the last of them; a crash may come before it does.
    """

    next_stage: int
    centre: npt.NDArray[np.float64]
    server: ServerState
    counts: ConfusionCounts
    contributions: dict[SiteId, int]
    closing: RoundClosed | None = None


@dataclass(frozen=True, kw_only=True)
class BegunSum:
    """An attempt at a secure sum for which sites may have charged: its terms, and everybody's commitment to them."""

    terms: SumTerms
    commitments: dict[SiteId, str]


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    job: str
    next_stage: int
    averaged: int
    counts: ConfusionCounts
    contributions: dict[SiteId, int]
    closing: RoundClosed | None
    tensors: str


class RunStore:
    """One run's folder on the coordinator's disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checkpoints = folder / "checkpoint"
        self._receipts = folder / "receipts"
        self._sum = self._checkpoints / "sum.json"
        for path in (self._checkpoints, self._receipts):
            path.mkdir(parents=True, exist_ok=True)

    @property
    def release_folder(self) -> Path:
        """Where the signed model goes."""
        return self.folder / "release"

    def save(self, state: RunState, job: TrainingJob) -> None:
        """Make ``state`` the one that a restart resumes from, whole or not at all."""
        tensors = write_weights(
            {
                "centre": state.centre,
                "weights": state.server.weights,
                "velocity": state.server.velocity,
                "average": state.server.average,
            },
            metadata={},
        )
        checkpoint = _Checkpoint(
            job=job.digest,
            next_stage=state.next_stage,
            averaged=state.server.averaged,
            counts=state.counts,
            contributions=state.contributions,
            closing=state.closing,
            tensors=digest(tensors),
        )
        path = self._checkpoints / f"{checkpoint.tensors}.safetensors"
        write_durably(path, tensors)
        write_durably(self._checkpoints / "latest.json", encode(checkpoint))
        for stale in self._checkpoints.glob("*.safetensors"):
            if stale != path:
                stale.unlink()

    def load(self, job: TrainingJob) -> RunState | None:
        """The state to resume ``job`` from; nothing if it never got through a stage.

        Raises:
            DocumentRefused, ModelRefused: the checkpoint is another job's, or damaged.
        """
        latest = self._checkpoints / "latest.json"
        if not latest.exists():
            return None
        checkpoint = decode(_Checkpoint, latest.read_bytes(), what=f"checkpoint {latest}")
        if checkpoint.job != job.digest:
            raise DocumentRefused(f"checkpoint {latest}: belongs to job {checkpoint.job[:16]}; give this job its own")
        try:
            raw = (self._checkpoints / f"{checkpoint.tensors}.safetensors").read_bytes()
        except OSError as error:
            raise ModelRefused(f"checkpoint {latest}: its arrays cannot be read ({error.strerror})") from error
        if digest(raw) != checkpoint.tensors:
            raise ModelRefused(f"checkpoint {latest}: its arrays have changed on disk")
        expected = dict.fromkeys(("weights", "velocity", "average"), ((job.parameters,), "float64"))
        centre = ((job.spec.model.feature_dimensions,), "float64")
        arrays = read_weights(raw, expected={**expected, "centre": centre})
        server = ServerState(
            weights=arrays["weights"],
            velocity=arrays["velocity"],
            average=arrays["average"],
            averaged=checkpoint.averaged,
        )
        return RunState(
            next_stage=checkpoint.next_stage,
            centre=arrays["centre"],
            server=server,
            counts=checkpoint.counts,
            contributions=checkpoint.contributions,
            closing=checkpoint.closing,
        )

    def keep_sum(self, begun: BegunSum) -> None:
        """Store the attempt that sites are about to charge for; it takes the place of the one before."""
        write_durably(self._sum, encode(begun))

    def begun_sum(self, job: TrainingJob, *, purpose: Purpose, round_index: int) -> BegunSum | None:
        """The attempt that was begun at this place of ``job``, if any was.

        Raises:
            DocumentRefused: the file is damaged.
        """
        if not self._sum.exists():
            return None
        begun = decode(BegunSum, self._sum.read_bytes(), what=f"attempt {self._sum}")
        task = begun.terms.task
        return begun if (task.job, task.purpose, task.round_index) == (job.digest, purpose, round_index) else None

    def keep_receipts(self, stage: int, receipts: dict[SiteId, bytes]) -> None:
        """Store the receipts of one stage, one file a stage and site; the same stage again overwrites itself."""
        name = f"{stage:05d}.json"
        for stale in self._receipts.glob(f"*/{name}"):
            # A site that answered before a crash and not after it is not counted.
            if stale.parent.name not in receipts:
                stale.unlink()
        for site, line in receipts.items():
            folder = self._receipts / site
            folder.mkdir(exist_ok=True)
            write_durably(folder / name, line)

    def keep_evaluation(self, tensors: dict[SiteId, bytes], evidence: SumEvidence | None) -> None:
        """Store what sites sent in the evaluation, byte for byte: a verifier adds the counts up again from it."""
        folder = self.folder / "evaluation"
        folder.mkdir(exist_ok=True)
        if evidence is not None:
            write_durably(evidence_file(self.folder), encode(evidence))
        for stale in folder.glob("*.safetensors"):
            if stale.stem not in tensors:
                stale.unlink()
        for site, raw in tensors.items():
            write_durably(evaluation_file(self.folder, site), raw)


def evidence_file(folder: Path) -> Path:
    """Where the job folder ``folder`` has what sites signed in the secure sum of the evaluation."""
    return folder / "evaluation" / "sum.json"


def evaluation_file(folder: Path, site: SiteId) -> Path:
    """Where the job folder ``folder`` has the bytes that ``site`` released in the evaluation."""
    return folder / "evaluation" / f"{site}.safetensors"


def write_durably(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` so that a power cut leaves either the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
