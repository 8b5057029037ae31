"""From a finished job to a bundle that partners and others can use: verified, exported, held against itself, signed."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from fedgrade.errors import LedgerBroken, SignatureRefused
from fedgrade.federation.bundle import (
    CARD,
    INDEX,
    ONNX,
    BundledFile,
    ReleaseIndex,
    receipt_lines,
    require_room,
    write_bundle,
)
from fedgrade.federation.portable_release import portable_release, require_equal
from fedgrade.federation.registry import RegisteredRelease, lineage, registry, release_of
from fedgrade.federation.release import DOCUMENT, WEIGHTS, OpenedRelease
from fedgrade.federation.verification import FederationProof, JobProof, verify_federation
from fedgrade.report.card import Publication, model_card
from fedgrade.trust.identity import Roster, SigningKey
from fedgrade.trust.ledger import LedgerWriter
from fedgrade.trust.records import COORDINATOR, Released
from server.coordinator_folder import CoordinatorFolder


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the coordinator wants published.

    Attributes:
        job: the beginning of a job's digest or a release's; empty for the newest release.
        licence: what users of the model may do, in the coordinator's words.
        partial: whether ledgers of some participants may be absent.
    """

    job: str
    licence: str
    partial: bool


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was published, and how well its ONNX file agrees with it."""

    release: RegisteredRelease
    bundle: str
    difference: float
    size: int


def publish_bundle(
    folder: CoordinatorFolder, wish: Wish, *, to: Path, cache: Path, now: datetime, rng: np.random.Generator
) -> Published:
    """Write the bundle of the release that ``wish`` names to ``to``, and say so in the coordinator's ledger.

    Guarantee: nothing is written unless the whole federation's folder verifies and the ONNX file agrees. The ledger
    knows of the bundle before anyone else can.

    Raises:
        LedgerBroken, SignatureRefused, DocumentRefused, ModelRefused: what does not hold.
        JobRefused: no such release.
        LedgerUnavailable: a run holds the ledger.
    """
    require_room(to)
    key, roster = SigningKey.load(folder.key), folder.read_roster()
    if key.public != roster.coordinator:
        raise SignatureRefused(f"{folder.key}: is not the key that {folder.roster} names as the coordinator's")
    proof = _proved(folder, roster)
    releases = registry(folder.root, coordinator=key.public)
    chosen = release_of(releases, wish.job)
    proved = _require_ledgers(proof, chosen, folder, partial=wish.partial)
    if (opened := proved.release) is None:
        raise LedgerBroken(f"job {chosen.job[:16]}: its release is not proved")
    model = portable_release(opened, cache=cache)
    difference = require_equal(model, opened, cache=cache, rng=rng)
    contents = {**_released(folder.job_folder(proved.job), opened), ONNX: model}
    files = {name: BundledFile.of(content) for name, content in contents.items()}
    earlier = lineage(releases, chosen)
    publication = Publication(earlier=earlier, difference=difference, licence=wish.licence, files=files)
    contents[CARD] = model_card(proved, proof, publication).encode()
    index = ReleaseIndex(
        release=chosen.digest,
        previous=chosen.previous,
        asset_type=chosen.asset_type,
        files={name: BundledFile.of(content) for name, content in sorted(contents.items())},
    )

    def record(bundle: str) -> None:
        if bundle not in chosen.bundles:
            _record(folder, key, Released(job=chosen.job, release_digest=chosen.digest, bundle=bundle), now=now)

    bundle = write_bundle(contents, index=index, folder=to, key=key, record=record)
    size = sum(file.size for file in index.files.values()) + (to / INDEX).stat().st_size
    return Published(release=chosen, bundle=bundle, difference=difference, size=size)


def _proved(folder: CoordinatorFolder, roster: Roster) -> FederationProof:
    if not any((folder.root / "sites").glob("*/ledger.jsonl")):
        raise LedgerBroken(
            f"{folder.root}: no partner's ledger is here to prove what was spent; ask partners for copies, and put "
            f"them at {folder.root}/sites/<site>/ledger.jsonl"
        )
    return verify_federation(folder.root, roster=roster)


def _require_ledgers(
    proof: FederationProof, chosen: RegisteredRelease, folder: CoordinatorFolder, *, partial: bool
) -> JobProof:
    """What was proved of the job of ``chosen``, with the ledgers of all who took part, or of some if ``partial``."""
    proved = proof.jobs[chosen.job]
    absent = [site for site in proved.job.participants if site not in proof.sites]
    if absent and not partial:
        raise LedgerBroken(f"{folder.root}: no ledger of {', '.join(absent)}; add the copies, or give --partial")
    return proved


def _released(folder: Path, opened: OpenedRelease) -> Mapping[str, bytes]:
    """What the job's ``folder`` has of the release that was verified: the files as they are, and the receipts."""
    release = folder / "release"
    receipts = {f"receipts/{site}.jsonl": receipt_lines(folder, site) for site in sorted(opened.release.contributions)}
    return {DOCUMENT: (release / DOCUMENT).read_bytes(), WEIGHTS: (release / WEIGHTS).read_bytes(), **receipts}


def _record(folder: CoordinatorFolder, key: SigningKey, body: Released, *, now: datetime) -> None:
    with LedgerWriter.open(folder.ledger, key=key, observe=lambda _: None) as writer:
        writer.start(owner=COORDINATOR, role="coordinator", now=now)
        writer.append(body, now=now)
