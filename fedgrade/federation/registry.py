"""Every release that a coordinator published, in order, and which came before which.

The registry is the coordinator's own ledger: append-only, signed, chained, and seen by every site that worked for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fedgrade.errors import JobRefused, LedgerBroken
from fedgrade.evaluation import GradingMetrics
from fedgrade.federation.release import open_release
from fedgrade.trust.identity import PublicKey
from fedgrade.trust.ledger import read_ledger
from fedgrade.trust.records import Released

_SHOWN_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class RegisteredRelease:
    """One release as the ledger lists it.

    ``previous`` is the digest of the release before it for the same asset type, empty for the first; ``bundles`` are
    the digests of bundles in which it was handed on.
    """

    digest: str
    job: str
    name: str
    asset_type: str
    published: str
    metrics: GradingMetrics
    previous: str
    bundles: tuple[str, ...]


def registry(folder: Path, *, coordinator: PublicKey) -> tuple[RegisteredRelease, ...]:
    """The releases of the federation in ``folder``, oldest first.

    A run that was resumed after its end signs its release anew; the one that lies in the job's folder counts.

    Raises:
        LedgerBroken: the coordinator's ledger does not hold, or its newest release of a job is not the one there.
        DocumentRefused, SignatureRefused, ModelRefused: a release cannot be opened.
    """
    standing, bundles = _in_ledger(folder / "coordinator" / "ledger.jsonl", coordinator)
    newest, releases = dict[str, str](), []
    for job, release_digest in standing.items():
        where = folder / "jobs" / job[:_SHOWN_DIGITS] / "release"
        opened = open_release(where, signed_by=coordinator)
        if opened.digest != release_digest or opened.release.job.digest != job:
            raise LedgerBroken(f"release {where}: is not the one that the coordinator's ledger says it published")
        spec = opened.release.job.spec
        releases.append(
            RegisteredRelease(
                digest=release_digest,
                job=job,
                name=spec.name,
                asset_type=spec.data.asset_type,
                published=opened.release.published,
                metrics=opened.release.metrics,
                previous=newest.get(spec.data.asset_type, ""),
                bundles=bundles.get(release_digest, ()),
            )
        )
        newest[spec.data.asset_type] = release_digest
    return tuple(releases)


def release_of(releases: tuple[RegisteredRelease, ...], job: str) -> RegisteredRelease:
    """The one of ``releases`` whose job's digest or own digest begins with ``job``, or the newest if that is empty.

    Raises:
        JobRefused: there is none, or more than one.
    """
    found = [one for one in releases if one.job.startswith(job) or one.digest.startswith(job)]
    if not found:
        raise JobRefused(f"job {job[:80]!r}: no release of it is in the coordinator's ledger; see `fedgrade releases`")
    if job and len(found) > 1:
        raise JobRefused(f"job {job[:80]!r}: {len(found)} releases begin with that; give more of its digest")
    return found[-1]


def lineage(releases: tuple[RegisteredRelease, ...], of: RegisteredRelease) -> tuple[RegisteredRelease, ...]:
    """The releases before ``of`` for its asset type, newest first."""
    by_digest, line = {one.digest: one for one in releases}, list[RegisteredRelease]()
    while of.previous:
        of = by_digest[of.previous]
        line.append(of)
    return tuple(line)


def _in_ledger(path: Path, coordinator: PublicKey) -> tuple[Mapping[str, str], Mapping[str, tuple[str, ...]]]:
    """The digest of each job's release, by the place of its first entry; and each release's bundles."""
    standing, bundles = dict[str, str](), dict[str, tuple[str, ...]]()
    for entry in read_ledger(path, key=coordinator):
        if not isinstance(entry.body, Released):
            continue
        body = entry.body
        if body.bundle:
            if standing.get(body.job) != body.release_digest:
                raise LedgerBroken(f"ledger {path}: entry {entry.sequence}: a bundle of a release that was not made")
            bundles[body.release_digest] = (*bundles.get(body.release_digest, ()), body.bundle)
        else:
            standing[body.job] = body.release_digest
    return MappingProxyType(standing), MappingProxyType(bundles)
