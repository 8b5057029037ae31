"""What a job's folder proves about its sums: whose releases are in each, and what those of the evaluation add up to."""

from collections.abc import Mapping
from pathlib import Path

from fedgrade.aggregation.mean import sum_of_releases
from fedgrade.aggregation.secure_sum.evidence import SumEvidence, retotal
from fedgrade.errors import (
    DocumentRefused,
    FedgradeError,
    LedgerBroken,
    MessageRefused,
)
from fedgrade.evaluation import ConfusionCounts
from fedgrade.federation.payloads import read_masked, read_release
from fedgrade.federation.site_proof import SiteProof
from fedgrade.federation.store import evaluation_file, evidence_file
from fedgrade.federation.sum_task import sums
from fedgrade.job import TrainingJob
from fedgrade.privacy.grid import from_grid
from fedgrade.trust.canonical import MAX_DOCUMENT_BYTES, decode, digest
from fedgrade.trust.identity import Roster, SiteId
from fedgrade.trust.records import Commit, RoundClosed

MAX_EVALUATION_BYTES = 2**20


def require_one_attempt(
    folder: Path,
    stage: int,
    body: RoundClosed,
    commits: Mapping[SiteId, Commit],
    *,
    under_masks: bool,
    sites: Mapping[SiteId, SiteProof],
) -> None:
    """Whoever is counted left its release under the masks of one and the same attempt; or nobody left any under masks.

    The charges of the sites whose ledgers are here say so: a site wrote the transcript down before it masked anything.

    Args:
        folder: the job's receipts.
        stage: which of the job's stages this is, from 0.
        body: what the coordinator's ledger says of it.
        commits: what each receipt says.
        under_masks: whether the job adds up under masks.
        sites: what the sites' ledgers prove.

    Raises:
        LedgerBroken: it is not so.
    """
    transcripts: set[str] = set()
    for site, commit in commits.items():
        if under_masks and commit.attempt != body.attempt:
            raise LedgerBroken(f"receipt {folder / site / f'{stage:05d}.json'}: is for another attempt of the sum")
        if site in sites:
            transcripts.add(sites[site].charges[commit.reserve].reserve.transcript)
    if any(bool(transcript) != under_masks for transcript in transcripts) or len(transcripts) > 1:
        raise LedgerBroken(
            f"job {body.job[:16]}: {body.purpose} round {body.round_index}: the charges that its receipts name are not "
            + ("for one secure sum" if under_masks else "for releases that leave as they are")
        )


def evaluation_counts(
    folder: Path,
    job: TrainingJob,
    commits: Mapping[SiteId, Commit],
    *,
    roster: Roster,
    sites: Mapping[SiteId, SiteProof],
) -> ConfusionCounts:
    """The confusion counts that the evaluation's own releases add up to, each the one that its site's receipt names.

    Raises:
        LedgerBroken: a release is missing or another, or the masks of a secure sum do not cancel, or its sites charged
            for another.
    """
    raw = {site: _released(evaluation_file(folder, site), site, commit) for site, commit in commits.items()}
    try:
        if sums(job):
            evidence = _evidence(evidence_file(folder), job, commits)
            _require_charged_for(evidence, commits, sites, path=evidence_file(folder))
            masked = {site: read_masked(tensors, job, "evaluate") for site, tensors in raw.items()}
            summed = retotal(evidence, masked, roster=roster)
        else:
            summed = sum_of_releases(
                [read_release(tensors, job, "evaluate", site=site) for site, tensors in raw.items()]
            )
    except FedgradeError as error:
        raise LedgerBroken(f"evaluation {folder / 'evaluation'}: {error}") from error
    total = from_grid(summed, max_norm=1.0, mechanism=job.plan.evaluate)
    grades = job.spec.grading.grades
    return ConfusionCounts.of(total.reshape(grades, grades))


def _released(path: Path, site: SiteId, commit: Commit) -> bytes:
    """The bytes in ``path``, which are those that the receipt of ``site`` names."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_EVALUATION_BYTES)
    except OSError as error:
        raise LedgerBroken(f"evaluation {path}: cannot be read ({error.strerror})") from error
    if digest(raw) != commit.message_digest:
        raise LedgerBroken(f"evaluation {path}: is not the release that the receipt of {site} names")
    return raw


def _require_charged_for(
    evidence: SumEvidence, commits: Mapping[SiteId, Commit], sites: Mapping[SiteId, SiteProof], *, path: Path
) -> None:
    """Return if every site whose ledger is here charged for the very sum that ``evidence`` is of."""
    for site, commit in commits.items():
        if site in sites and sites[site].charges[commit.reserve].reserve.transcript != evidence.transcript:
            raise MessageRefused(f"{path}: is of another attempt than the one that {site} charged for")


def _evidence(path: Path, job: TrainingJob, commits: Mapping[SiteId, Commit]) -> SumEvidence:
    """What sites signed in the sum of the evaluation: of this job, and of exactly those whose receipts count.

    Raises:
        DocumentRefused: it cannot be read.
        MessageRefused: it is about something else.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise DocumentRefused(f"{path}: cannot be read ({error.strerror})") from error
    evidence = decode(SumEvidence, raw, what=str(path))
    if set(evidence.commitments) != set(evidence.terms.participants):
        raise MessageRefused(f"{path}: has commitments of others than took part")
    task = evidence.terms.task
    attempts = {commit.attempt for commit in commits.values()}
    if (task.job, task.purpose) != (job.digest, "evaluate") or {task.attempt} != attempts:
        raise MessageRefused(f"{path}: is about another sum than the receipts")
    if set(evidence.vectors) != set(commits):
        raise MessageRefused(f"{path}: adds up {len(evidence.vectors)} sites, and {len(commits)} have receipts")
    return evidence
