"""What copies of ledgers, receipts and releases prove, offline and without trusting whoever wrote them.

Everything is recomputed: the hash chains, the signatures, each charge from its mechanism, each sum against its
ceiling, each receipt against both ledgers, each release against its rounds. The first thing that does not hold is
named, and nothing after it is believed. Needs neither torch nor Flower.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from fedgrade.errors import DocumentRefused, FedgradeError, LedgerBroken
from fedgrade.evaluation import metrics
from fedgrade.federation.claims import (
    Claim,
    claims_in,
    kept_claims,
    require_coordinator_holds,
    require_sites_hold,
    require_stages_closed,
)
from fedgrade.federation.membership import Members, with_former
from fedgrade.federation.release import OpenedRelease, open_release
from fedgrade.federation.rounds import Stage, stages_of
from fedgrade.federation.site_proof import Charge, SiteProof, prove_site
from fedgrade.federation.sum_proof import evaluation_counts, require_one_attempt
from fedgrade.federation.sum_task import sums
from fedgrade.job import TrainingJob
from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.privacy.budget import Spending
from fedgrade.privacy.plan import ObserverEpsilons
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import Roster, SiteId, read_roster, site_id
from fedgrade.trust.ledger import GENESIS_PREVIOUS, MAX_ENTRY_BYTES, open_receipt, read_lines
from fedgrade.trust.records import Commit, DiscreteGaussian, Genesis, Released, RoundClosed
from fedgrade.trust.transparency import MerkleTree


@dataclass(frozen=True, kw_only=True)
class JobProof:
    """One job as both sides recorded it: its rounds, who answered each, what it cost whom, and what was published."""

    job: TrainingJob
    rounds: tuple[RoundClosed, ...]
    release: OpenedRelease | None
    observers: dict[SiteId, ObserverEpsilons]


@dataclass(frozen=True, kw_only=True)
class FederationProof:
    """Everything that a folder proves. ``entries`` are those of all ledgers together.

    ``witnessed`` counts the heads of one side's ledger that the other side saw and wrote down, all of which hold. The
    coordinator's ledger has a head and a tree's root like every site's; :class:`SiteProof` says what they are.
    """

    roster: Roster
    sites: dict[SiteId, SiteProof]
    jobs: dict[str, JobProof]
    entries: int
    witnessed: int
    coordinator_head: str
    coordinator_entries: int
    coordinator_root: str


@dataclass(frozen=True, kw_only=True)
class _CoordinatorLog:
    rounds: dict[str, list[RoundClosed]]
    published: dict[str, set[str]]
    claims: dict[SiteId, list[Claim]]
    members: Members
    head: str
    tree: MerkleTree


def verify_federation(folder: Path, *, roster: Roster | None = None) -> FederationProof:
    """What the ledgers, receipts and releases under ``folder`` prove.

    Args:
        folder: holds ``roster.json``, ``sites/<site>/ledger.jsonl``, ``coordinator/ledger.jsonl`` and
            ``jobs/<job>/receipts``, ``evaluation`` and ``release``, as a coordinator and its partners keep them;
            ``coordinator/witnessed`` if it is there.
        roster: the roster that the verifier trusts; without it, the folder's own, which proves consistency but not
            whose keys these are.

    Raises:
        LedgerBroken, SignatureRefused, DocumentRefused, ModelRefused: names the first thing that does not hold.
    """
    trusted = roster if roster is not None else read_roster(folder / "roster.json")
    paths, ledger = dict(_site_ledgers(folder)), folder / "coordinator" / "ledger.jsonl"
    if not paths:
        raise DocumentRefused(f"{folder}: no sites/<site>/ledger.jsonl here; give the folder of a federation")
    log = _coordinator_log(ledger, trusted)
    trusted = with_former(trusted, log.members.membership)
    for site, claim in kept_claims(folder / "coordinator" / "witnessed", paths, trusted):
        log.claims.setdefault(site, []).append(claim)
    sites = {
        site: prove_site(path, site=site, roster=trusted, sizes={claim.entries for claim in log.claims.get(site, ())})
        for site, path in paths.items()
    }
    for job_digest in log.published:
        if job_digest not in log.rounds:
            raise LedgerBroken(f"job {job_digest[:16]}: the coordinator's ledger says it was released, but not trained")
    _check_nothing_is_uncounted(folder / "jobs", log.rounds, log.published)
    jobs = {
        job_digest: _prove_job(folder, job_digest, closed, log.published, sites=sites, roster=trusted)
        for job_digest, closed in log.rounds.items()
    }
    _require_counterparts(sites, jobs)
    witnessed = require_sites_hold(sites, log.claims) + require_coordinator_holds(ledger, log.tree, sites)
    require_stages_closed(sites, log.rounds)
    return FederationProof(
        roster=trusted,
        sites=sites,
        jobs=jobs,
        entries=log.tree.entries + sum(proof.entries for proof in sites.values()),
        witnessed=witnessed,
        coordinator_head=log.head,
        coordinator_entries=log.tree.entries,
        coordinator_root=log.tree.root.hex(),
    )


def _site_ledgers(folder: Path) -> Iterator[tuple[SiteId, Path]]:
    for path in sorted((folder / "sites").glob("*/ledger.jsonl")):
        yield site_id(path.parent.name), path


def _coordinator_log(path: Path, roster: Roster) -> _CoordinatorLog:
    rounds: dict[str, list[RoundClosed]] = {}
    published: dict[str, set[str]] = {}
    claims: dict[SiteId, list[Claim]] = {}
    head, tree, members = GENESIS_PREVIOUS, MerkleTree(), Members()
    for line, entry in read_lines(path, key=roster.coordinator):
        head, tree = digest(line), tree.after(line)
        members = members.after(entry, where=f"ledger {path}: entry {entry.sequence}")
        for site, claim in claims_in(path, entry):
            claims.setdefault(site, []).append(claim)
        match entry.body:
            case Genesis() if entry.body.role != "coordinator":
                raise LedgerBroken(f"ledger {path}: entry 0: is a {entry.body.role}'s, not the coordinator's")
            case RoundClosed():
                rounds.setdefault(entry.body.job, []).append(entry.body)
            case Released():
                published.setdefault(entry.body.job, set()).add(entry.body.release_digest)
            case _:
                pass
    if tree.entries == 0:
        raise LedgerBroken(f"ledger {path}: is empty; a ledger begins with a genesis entry")
    return _CoordinatorLog(rounds=rounds, published=published, claims=claims, members=members, head=head, tree=tree)


def _check_nothing_is_uncounted(
    jobs: Path, rounds: Mapping[str, list[RoundClosed]], published: Mapping[str, set[str]]
) -> None:
    """No receipt or release lies in the folder that the coordinator's ledger should know of and does not.

    Only a ledger that was rolled back leaves such; or a run that was interrupted, which may leave the receipts of the
    one stage that was open.
    """
    closed = {job_digest[:16]: len(stages) for job_digest, stages in rounds.items()}
    released = {job_digest[:16] for job_digest in published}
    for path in sorted(jobs.glob("*/receipts/*/*.json")):
        if path.stem > f"{closed.get(path.parts[-4], 0):05d}":
            raise LedgerBroken(f"receipt {path}: the coordinator's ledger has no such stage; it was rolled back")
    for path in sorted(jobs.glob("*/release")):
        if path.parent.name not in released:
            raise LedgerBroken(
                f"release {path}: the coordinator's ledger does not say that it was published; if its run was "
                "interrupted, let it finish"
            )


def _prove_job(
    folder: Path,
    job_digest: str,
    closed: list[RoundClosed],
    published: Mapping[str, set[str]],
    *,
    sites: Mapping[SiteId, SiteProof],
    roster: Roster,
) -> JobProof:
    job = _sealed_job(job_digest, sites)
    where = folder / "jobs" / job_digest[:16]
    _check_stages(job, closed)
    commits = [
        _check_receipts(where / "receipts", stage, body, sites=sites, roster=roster)
        for stage, body in enumerate(closed)
    ]
    for stage, body in enumerate(closed):
        require_one_attempt(where / "receipts", stage, body, commits[stage], under_masks=sums(job), sites=sites)
    _check_weight_chain(closed, where=f"job {job_digest[:16]}")
    release = None
    if published.get(job_digest):
        release = open_release(where / "release", signed_by=roster.coordinator)
        if release.digest not in published[job_digest] or release.release.job.digest != job_digest:
            raise LedgerBroken(f"release {where}: is not the one that the coordinator's ledger says it published")
        _check_release(release, closed, where=f"release {where}")
        if release.release.counts != evaluation_counts(where, job, commits[-1], roster=roster, sites=sites):
            raise LedgerBroken(f"release {where}: the counts it states are not the sum of what the sites released")
    return JobProof(job=job, rounds=tuple(closed), release=release, observers=_observers(job, closed, sites))


def _sealed_job(job_digest: str, sites: Mapping[SiteId, SiteProof]) -> TrainingJob:
    for proof in sites.values():
        if job_digest in proof.jobs:
            return proof.jobs[job_digest]
    raise LedgerBroken(
        f"job {job_digest[:16]}: the coordinator closed rounds of it, but no site's ledger admits it; if these are "
        "copies from before that job, ask the partners for newer ones"
    )


def _check_stages(job: TrainingJob, closed: list[RoundClosed]) -> None:
    """The closed rounds are the job's own stages from the first on, each once, each answered by enough participants."""
    where, stages = f"the coordinator's ledger: job {job.digest[:16]}", stages_of(job)
    for number, body in enumerate(closed):
        stage = Stage(purpose=body.purpose, round_index=body.round_index)
        if number >= len(stages) or stage != stages[number]:
            raise LedgerBroken(
                f"{where}: closes {body.purpose} round {body.round_index} as stage {number + 1}; "
                f"the job's {len(stages)} stages close in order, each once"
            )
        if strangers := sorted(set(body.receipts) - set(job.declared_items)):
            raise LedgerBroken(f"{where}: stage {number + 1} counts {strangers[0]}, which does not take part")
        if set(body.ledgers) != set(body.receipts):
            raise LedgerBroken(f"{where}: stage {number + 1} does not say where the ledgers stood that it counts")
        if len(body.receipts) < job.spec.aggregation.minimum_sites:
            raise LedgerBroken(
                f"{where}: stage {number + 1} was closed with {len(body.receipts)} receipts; "
                f"aggregation.minimum_sites is {job.spec.aggregation.minimum_sites}"
            )


def _check_receipts(
    folder: Path, stage: int, body: RoundClosed, *, sites: Mapping[SiteId, SiteProof], roster: Roster
) -> dict[SiteId, Commit]:
    """What each receipt says that the coordinator counted: it exists, verifies, and stands in its site's own ledger."""
    commits: dict[SiteId, Commit] = {}
    for site, expected in body.receipts.items():
        path = folder / site / f"{stage:05d}.json"
        where = f"receipt {path}"
        try:
            with path.open("rb") as file:
                line = file.read(MAX_ENTRY_BYTES)
        except OSError as error:
            raise LedgerBroken(f"{where}: cannot be read ({error.strerror})") from error
        if digest(line) != expected:
            raise LedgerBroken(f"{where}: is not the receipt that the coordinator's ledger counted")
        try:
            entry = open_receipt(line, key=roster.key_of(site))
        except FedgradeError as error:
            raise LedgerBroken(f"{where}: {error}") from error
        if not isinstance(entry.body, Commit) or (entry.body.job, entry.body.purpose, entry.body.round_index) != (
            body.job,
            body.purpose,
            body.round_index,
        ):
            raise LedgerBroken(f"{where}: is for another round")
        if entry.sequence + 1 != body.ledgers[site].entries:
            raise LedgerBroken(
                f"{where}: is entry {entry.sequence}; the coordinator's ledger says that it was the last of "
                f"{body.ledgers[site].entries}"
            )
        if site in sites:
            _check_against_ledger(where, line, entry.body, body, sites[site])
        commits[site] = entry.body
    return commits


def _check_against_ledger(where: str, line: bytes, commit: Commit, closed: RoundClosed, proof: SiteProof) -> None:
    charge = proof.charges.get(commit.reserve)
    if digest(line) not in proof.committed_lines or charge is None:
        site, seen = proof.site, closed.ledgers[proof.site].entries
        if proof.entries < seen:
            raise LedgerBroken(
                f"{where}: does not stand in the ledger of {site}, of which this copy has {proof.entries} entries and "
                f"the coordinator saw {seen}; ask {site} for a newer one, unless that ledger was rolled back or forked"
            )
        raise LedgerBroken(f"{where}: does not stand in the ledger of {site}; that ledger was rolled back or forked")
    if charge.reserve.weights_digest != closed.weights_before:
        raise LedgerBroken(f"{where}: {proof.site} was shown other weights than the coordinator's ledger says")


def _check_weight_chain(closed: list[RoundClosed], *, where: str) -> None:
    steps = [body for body in closed if body.purpose != "evaluate"]
    for before, after in itertools.pairwise(steps):
        if before.weights_after != after.weights_before:
            raise LedgerBroken(f"{where}: {after.purpose} round {after.round_index} did not start where the last ended")


def _check_release(release: OpenedRelease, closed: list[RoundClosed], *, where: str) -> None:
    stages = len(stages_of(release.release.job))
    if len(closed) != stages:
        raise LedgerBroken(f"{where}: was published after {len(closed)} of the job's {stages} stages")
    counted: dict[SiteId, int] = {}
    for body in closed:
        for site in body.receipts:
            counted[site] = counted.get(site, 0) + 1
    if release.release.contributions != counted:
        raise LedgerBroken(f"{where}: the contributions it states are not those of the coordinator's ledger")
    if release.release.metrics != metrics(release.release.counts, release.release.job.spec.grading):
        raise LedgerBroken(f"{where}: the metrics it states are not those of its own counts")
    if closed[-1].weights_before != release.release.weights_digest:
        raise LedgerBroken(f"{where}: its weights are not those that were evaluated")


def _require_counterparts(sites: Mapping[SiteId, SiteProof], jobs: Mapping[str, JobProof]) -> None:
    for site, proof in sites.items():
        for charge in proof.charges.values():
            job = jobs.get(charge.reserve.job)
            if job is not None and site not in job.job.declared_items:
                raise LedgerBroken(f"site {site}: charged for job {charge.reserve.job[:16]}, which does not name it")


def _observers(
    job: TrainingJob, closed: list[RoundClosed], sites: Mapping[SiteId, SiteProof]
) -> dict[SiteId, ObserverEpsilons]:
    """Epsilon per observer, all at the plan's delta, from what was really released and the noise of who answered.

    Whoever sees uploads faces the site's own noise. Whoever sees only models faces, in each round, the noise of all
    who answered (another partner: less its own share). Attempts beyond the one that was used count in full.
    """
    observers: dict[SiteId, ObserverEpsilons] = {}
    for site, proof in sites.items():
        mine = [charge for charge in proof.charges.values() if charge.reserve.job == job.digest]
        training = [charge for charge in mine if charge.reserve.purpose != "evaluate"]
        if not training:
            continue
        own = _own_epsilon(training, delta=job.plan.delta)
        if job.plan.mode == "local_sgd":
            observers[site] = ObserverEpsilons(coordinator=own, other_partner=own, model_holder=own, full_collusion=own)
            continue
        partner = zcdp_epsilon(_shared_rho(site, training, closed, removed=1), delta=job.plan.delta)
        holder = zcdp_epsilon(_shared_rho(site, training, closed, removed=0), delta=job.plan.delta)
        observers[site] = ObserverEpsilons(
            coordinator=holder if job.plan.mode == "distributed" else own,
            other_partner=partner,
            model_holder=holder,
            full_collusion=own,
        )
    return observers


def _own_epsilon(charges: list[Charge], *, delta: Fraction) -> float:
    """Epsilon at ``delta`` of ``charges`` against whoever sees the site's own releases: nobody else's noise helps.

    An item in a cohort that dropped out on the way paid for fewer of them.
    """
    spending = Spending()
    for charge in charges:
        spending = spending.charged(charge.reserve.mechanism, job=charge.reserve.job)
    return spending.epsilon(delta=delta, composition=charges[0].composition)


def _shared_rho(site: SiteId, charges: list[Charge], closed: list[RoundClosed], *, removed: int) -> Fraction:
    """Rho of one site's items against whoever sees the sums only and can take ``removed`` other shares of noise out."""
    answered = {(body.purpose, body.round_index): len(body.receipts) for body in closed if site in body.receipts}
    total = Fraction(0)
    for charge in charges:
        mechanism = charge.reserve.mechanism
        if not isinstance(mechanism, DiscreteGaussian):
            raise LedgerBroken(f"site {site}: a Poisson mechanism in a full-batch job")
        # One attempt of a round went into the sum; taken out here, so that any other finds no company.
        shares = answered.pop((charge.reserve.purpose, charge.reserve.round_index), 1)
        total += mechanism.rho / max(1, shares - removed)
    return total
