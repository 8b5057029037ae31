"""What a coordinator keeps of its runs: a checkpoint after every stage, receipts, what was measured, the release.

A crash loses at most the stage that was open; asking for it again costs sites nothing, because they resend. Where it is
kept is given in: :class:`Folder` is a folder on disk, server/database.py a database, whose owner has no key. Both
checkpoints and begun attempts are signed by the coordinator: nobody else says what a run goes on from.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from fedgrade.aggregation.mean import ServerState
from fedgrade.aggregation.secure_sum.documents import SumTerms
from fedgrade.aggregation.secure_sum.evidence import SumEvidence
from fedgrade.errors import DocumentRefused, ModelRefused, SignatureRefused, StoreUnavailable
from fedgrade.evaluation import ConfusionCounts
from fedgrade.job import TrainingJob
from fedgrade.model.weights import read_weights, write_weights
from fedgrade.trust.canonical import digest, encode
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.records import Purpose, RoundClosed

MAX_KEPT_BYTES: Final = 2**30

_LATEST, _SUM, _EVIDENCE = "checkpoint/latest.json", "checkpoint/sum.json", "evaluation/sum.json"
_ARRAYS, _PART = ".safetensors", ".part"


class Documents(Protocol):
    """Bytes under names, kept so that a power cut leaves each as it was before or after a change, whole.

    Names are relative paths, ``/`` between their parts. Each name holds at most ``MAX_KEPT_BYTES``.
    """

    def read(self, name: str, *, limit: int = MAX_KEPT_BYTES) -> bytes | None:
        """What ``name`` holds; nothing if it holds nothing.

        Raises:
            DocumentRefused: it cannot be read, is over ``limit`` bytes, or is not what was written.
        """

    def names(self, folder: str) -> tuple[str, ...]:
        """Every name below ``folder``, or every one if that is empty; in order."""

    def write(self, changes: Mapping[str, bytes | None]) -> None:
        """Let each name hold its bytes, or nothing where it has None.

        A database does all of it or nothing. Files are changed one after the other, in the order of ``changes``: a
        crash leaves the first few changed, so what refers to others comes after them.

        Raises:
            StoreUnavailable: it could not be kept.
        """

    def where(self, name: str) -> str:
        """Where ``name`` is kept, for people."""


@dataclass(frozen=True, kw_only=True)
class Below:
    """Those of ``documents`` that are below ``folder``, under the rest of their names."""

    documents: Documents
    folder: str

    def read(self, name: str, *, limit: int = MAX_KEPT_BYTES) -> bytes | None:
        """What ``name`` holds."""
        return self.documents.read(f"{self.folder}/{name}", limit=limit)

    def names(self, folder: str) -> tuple[str, ...]:
        """Every name below ``folder``."""
        found = self.documents.names(f"{self.folder}/{folder}" if folder else self.folder)
        return tuple(name.removeprefix(f"{self.folder}/") for name in found)

    def write(self, changes: Mapping[str, bytes | None]) -> None:
        """Let each name hold its bytes, or nothing."""
        self.documents.write({f"{self.folder}/{name}": content for name, content in changes.items()})

    def where(self, name: str) -> str:
        """Where ``name`` is kept."""
        return self.documents.where(f"{self.folder}/{name}")


class Folder:
    """Documents as files below a folder, one a name."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, *, limit: int = MAX_KEPT_BYTES) -> bytes | None:
        """What ``name`` holds.

        Raises:
            DocumentRefused: the file cannot be read, or is over ``limit`` bytes.
        """
        path = self._root / name
        try:
            with path.open("rb") as file:
                raw = file.read(limit + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DocumentRefused(f"{path}: cannot be read ({error.strerror})") from error
        if len(raw) > limit:
            raise DocumentRefused(f"{path}: over {limit} bytes")
        return raw

    def names(self, folder: str) -> tuple[str, ...]:
        """Every file below ``folder``."""
        paths = (self._root / folder).rglob("*")
        # What a write that was interrupted left behind was never a document.
        files = (path for path in paths if path.suffix != _PART and path.is_file())
        return tuple(sorted(path.relative_to(self._root).as_posix() for path in files))

    def write(self, changes: Mapping[str, bytes | None]) -> None:
        """Change one file after the other, each durably.

        Raises:
            StoreUnavailable: one could not be written; it is as it was, and those after it too.
        """
        for name, content in changes.items():
            path = self._root / name
            try:
                if content is None:
                    path.unlink(missing_ok=True)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_durably(path, content)
            except OSError as error:
                # A piece of a file on a full disk keeps it full.
                with suppress(OSError):
                    path.with_name(path.name + _PART).unlink(missing_ok=True)
                raise StoreUnavailable(f"{path}: cannot be written ({error.strerror})") from error

    def where(self, name: str) -> str:
        """The path of the file."""
        return str(self._root / name)


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
class Checkpoint:
    """What ``checkpoint/latest.json`` seals: a :class:`RunState`, its arrays by their digest ``tensors``."""

    job: str
    next_stage: int
    averaged: int
    counts: ConfusionCounts
    contributions: dict[SiteId, int]
    closing: RoundClosed | None
    tensors: str


class RunStore:
    """What a coordinator keeps of one run."""

    def __init__(self, documents: Documents, *, key: SigningKey) -> None:
        """What ``documents`` hold of it; what a run goes on from is signed with the coordinator's ``key``."""
        self._documents = documents
        self._key = key
        self._pending: dict[str, bytes | None] | None = None

    @property
    def release(self) -> Documents:
        """Where the signed model goes."""
        return Below(documents=self._documents, folder="release")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is stored in this block is written at its end, in one go; of a block that is left early, nothing."""
        self._pending = {}
        try:
            yield
            self._documents.write(self._pending)
        finally:
            self._pending = None

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
        checkpoint = Checkpoint(
            job=job.digest,
            next_stage=state.next_stage,
            averaged=state.server.averaged,
            counts=state.counts,
            contributions=state.contributions,
            closing=state.closing,
            tensors=digest(tensors),
        )
        name = _arrays(checkpoint)
        stale = [other for other in self._documents.names("checkpoint") if other.endswith(_ARRAYS) and other != name]
        self._write({name: tensors, _LATEST: seal(checkpoint, self._key), **dict.fromkeys(stale)})

    def load(self, job: TrainingJob) -> RunState | None:
        """The state to resume ``job`` from; nothing if it never got through a stage.

        Raises:
            DocumentRefused, ModelRefused: the checkpoint is another job's, or damaged.
            SignatureRefused: this coordinator did not sign it.
        """
        latest, raw = self._documents.where(_LATEST), self._documents.read(_LATEST)
        if raw is None:
            return None
        checkpoint = open_sealed(raw, as_=Checkpoint, signed_by=self._key.public, what=f"checkpoint {latest}")
        if checkpoint.job != job.digest:
            raise DocumentRefused(f"checkpoint {latest}: belongs to job {checkpoint.job[:16]}; give this job its own")
        tensors = self._documents.read(_arrays(checkpoint))
        if tensors is None:
            raise ModelRefused(f"checkpoint {latest}: its arrays are gone")
        if digest(tensors) != checkpoint.tensors:
            raise ModelRefused(f"checkpoint {latest}: its arrays have changed since they were written")
        expected = dict.fromkeys(("weights", "velocity", "average"), ((job.parameters,), "float64"))
        centre = ((job.spec.model.feature_dimensions,), "float64")
        arrays = read_weights(tensors, expected={**expected, "centre": centre})
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
        self._write({_SUM: seal(begun, self._key)})

    def begun_sum(self, job: TrainingJob, *, purpose: Purpose, round_index: int) -> BegunSum | None:
        """The attempt that was begun at this place of ``job``, if any was.

        Raises:
            SignatureRefused: it is not what this coordinator signed.
        """
        where, raw = self._documents.where(_SUM), self._documents.read(_SUM)
        if raw is None:
            return None
        try:
            begun = open_sealed(raw, as_=BegunSum, signed_by=self._key.public, what="attempt")
        except (DocumentRefused, SignatureRefused) as error:
            raise SignatureRefused(
                f"attempt {where}: was not signed by this coordinator ({self._key.public.fingerprint}), and nobody is "
                f"asked by it; restore the newest copy that was, or start another job ({error})"
            ) from error
        task = begun.terms.task
        return begun if (task.job, task.purpose, task.round_index) == (job.digest, purpose, round_index) else None

    def keep_receipts(self, stage: int, receipts: dict[SiteId, bytes]) -> None:
        """Store the receipts of one stage, one a stage and site; the same stage again takes its own place."""
        kept: dict[str, bytes | None] = {f"receipts/{site}/{stage:05d}.json": line for site, line in receipts.items()}
        # A site that answered before a crash and not after it is not counted.
        ending = f"/{stage:05d}.json"
        stale = [name for name in self._documents.names("receipts") if name.endswith(ending) and name not in kept]
        self._write({**dict.fromkeys(stale), **kept})

    def keep_evaluation(self, tensors: dict[SiteId, bytes], evidence: SumEvidence | None) -> None:
        """Store what sites sent in the evaluation, byte for byte: a verifier adds the counts up again from it."""
        kept: dict[str, bytes | None] = {f"evaluation/{site}{_ARRAYS}": raw for site, raw in tensors.items()}
        stale = [name for name in self._documents.names("evaluation") if name.endswith(_ARRAYS) and name not in kept]
        signed = {} if evidence is None else {_EVIDENCE: encode(evidence)}
        self._write({**signed, **dict.fromkeys(stale), **kept})

    def _write(self, changes: Mapping[str, bytes | None]) -> None:
        if self._pending is None:
            self._documents.write(changes)
        else:
            self._pending.update(changes)


def _arrays(checkpoint: Checkpoint) -> str:
    return f"checkpoint/{checkpoint.tensors}{_ARRAYS}"


def evidence_file(folder: Path) -> Path:
    """Where the job folder ``folder`` has what sites signed in the secure sum of the evaluation."""
    return folder / _EVIDENCE


def evaluation_file(folder: Path, site: SiteId) -> Path:
    """Where the job folder ``folder`` has the bytes that ``site`` released in the evaluation."""
    return folder / "evaluation" / f"{site}{_ARRAYS}"


def write_durably(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` so that a power cut leaves either the old file or the new one, whole."""
    temporary = path.with_name(path.name + _PART)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        # A full disk: what there was no room for takes none.
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
