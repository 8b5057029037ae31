"""What one site's ledger proves on its own: every charge recomputed, every ceiling kept, every release paid for.

Who pays for a release follows from the ledger, and is recomputed too: a cohort that could pay is never spared.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedgrade.errors import FedgradeError, LedgerBroken
from fedgrade.federation.charging import require_same_terms
from fedgrade.federation.payers import Payers
from fedgrade.job import TrainingJob
from fedgrade.privacy.budget import Spending, charge_all, require_within
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import open_sealed
from fedgrade.trust.identity import Roster, SiteId
from fedgrade.trust.ledger import GENESIS_PREVIOUS, Entry, read_lines
from fedgrade.trust.records import (
    COORDINATOR,
    Abort,
    AccountKey,
    Body,
    Checkpoint,
    Commit,
    Composition,
    Correction,
    DatasetOpened,
    Enrolled,
    Genesis,
    Partition,
    PlanAccepted,
    Released,
    Reserve,
    Revoked,
    RoundClosed,
    Software,
)
from fedgrade.trust.transparency import MerkleTree, TreeHead, open_head


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One reservation, when it was made, and what each account that paid had spent in all right after it."""

    reserve: Reserve
    time: str
    after: Mapping[AccountKey, Spending]
    composition: Composition
    outcome: str  # "committed", "aborted" or "open"

    def epsilon_after(self, account: AccountKey) -> float:
        """Total epsilon of ``account`` once this was charged."""
        return self.after[account].epsilon(delta=self.reserve.delta, composition=self.composition)


@dataclass(frozen=True, kw_only=True)
class AccountProof:
    """One account: what it was opened with, all it was charged, and what that amounts to."""

    dataset: DatasetOpened
    spending: Spending
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class SiteProof:
    """Everything that one site's ledger proves. ``charges`` are by ledger sequence number, in order.

    ``head`` is the digest of the last line and ``root`` that of the tree over all of them, as in a
    :class:`~fedgrade.trust.transparency.TreeHead`; either stands for the whole ledger. ``roots`` are those at the
    sizes that were asked for and that it reaches; ``checkpoints`` the heads of the coordinator's ledger that the site
    recorded, by sequence number. ``software`` is what ran each job, by the site's own word; ``corrections`` by sequence
    number.
    """

    site: SiteId
    entries: int
    head: str
    root: str
    roots: dict[int, str]
    checkpoints: dict[int, TreeHead]
    accounts: dict[AccountKey, AccountProof]
    charges: dict[int, Charge]
    corrections: dict[int, Correction]
    jobs: dict[str, TrainingJob]
    software: dict[str, Software]
    committed_lines: frozenset[str]

    def charges_to(self, account: AccountKey) -> tuple[Charge, ...]:
        """Every charge that ``account`` paid, in order."""
        return tuple(charge for charge in self.charges.values() if account in charge.reserve.accounts)

    def job_epsilon(self, job: str, *, partition: Partition) -> float:
        """Epsilon that one job alone cost an item on one side, at the account's own delta, in the cohort it cost most.

        Cohorts compose in parallel: no item pays for another's.
        """
        return max(
            (
                self._job_spending(job, account).epsilon(
                    delta=proof.dataset.delta, composition=proof.dataset.composition
                )
                for account, proof in self.accounts.items()
                if account.partition == partition
            ),
            default=0.0,
        )

    def _job_spending(self, job: str, account: AccountKey) -> Spending:
        spending = Spending()
        for charge in self.charges_to(account):
            if charge.reserve.job == job:
                spending = spending.charged(charge.reserve.mechanism, job=job)
        return spending


def prove_site(path: Path, *, site: SiteId, roster: Roster, sizes: Collection[int] = ()) -> SiteProof:
    """What the ledger at ``path`` proves about ``site``.

    Args:
        path: the ledger.
        site: whose it must be.
        roster: whose keys these are.
        sizes: numbers of entries at which the tree's root is wanted.

    Raises:
        LedgerBroken: names the first entry that is not what it must be.
    """
    reading = _Reading(site=site, roster=roster)
    head, tree, roots = GENESIS_PREVIOUS, MerkleTree(), dict[int, str]()
    for line, entry in read_lines(path, key=roster.key_of(site)):
        head, tree = digest(line), tree.after(line)
        try:
            reading.take(entry, line_digest=head)
        except FedgradeError as error:
            raise LedgerBroken(f"ledger {path}: entry {entry.sequence}: {error}") from error
        if tree.entries in sizes:
            roots[tree.entries] = tree.root.hex()
    if tree.entries == 0:
        raise LedgerBroken(f"ledger {path}: is empty; a ledger begins with a genesis entry")
    return reading.proof(head=head, tree=tree, roots=roots)


@dataclass
class _Reading:
    """The fold over one ledger: the rules of which entry may follow which live here and nowhere else."""

    site: SiteId
    roster: Roster
    datasets: dict[tuple[str, str], DatasetOpened] = field(default_factory=dict)
    spending: dict[AccountKey, Spending] = field(default_factory=dict)
    jobs: dict[str, TrainingJob] = field(default_factory=dict)
    software: dict[str, Software] = field(default_factory=dict)
    corrections: dict[int, Correction] = field(default_factory=dict)
    admitted: dict[str, tuple[AccountKey, ...]] = field(default_factory=dict)
    charges: dict[int, Charge] = field(default_factory=dict)
    places: set[tuple[str, str, int, int]] = field(default_factory=set)
    committed: set[str] = field(default_factory=set)
    checkpoints: dict[int, TreeHead] = field(default_factory=dict)
    payers: Payers = field(init=False)

    def __post_init__(self) -> None:
        self.payers = Payers(site=self.site, datasets=self.datasets, spending=self.spending)

    def take(self, entry: Entry, *, line_digest: str) -> None:
        body: Body = entry.body
        match body:
            case Genesis():
                self._genesis(body)
            case DatasetOpened():
                self._open_dataset(body)
            case PlanAccepted():
                self._plan(body)
            case Reserve():
                self._reserve(entry, body)
            case Commit():
                self._settle(body.reserve, "committed", place=(body.job, body.purpose, body.round_index, body.attempt))
                self.committed.add(line_digest)
            case Abort():
                self._settle(body.reserve, "aborted", place=None)
            case Correction():
                self._correct(entry.sequence, body)
            case Checkpoint():
                self._checkpoint(entry.sequence, body)
            case RoundClosed() | Released() | Enrolled() | Revoked():
                raise LedgerBroken("a coordinator's entry in a site's ledger")

    def proof(self, *, head: str, tree: MerkleTree, roots: dict[int, str]) -> SiteProof:
        accounts = {
            account: AccountProof(
                dataset=self.payers.dataset(account),
                spending=spending,
                epsilon=spending.epsilon(
                    delta=self.payers.dataset(account).delta, composition=self.payers.dataset(account).composition
                ),
            )
            for account, spending in self.spending.items()
        }
        return SiteProof(
            site=self.site,
            entries=tree.entries,
            head=head,
            root=tree.root.hex(),
            roots=roots,
            checkpoints=self.checkpoints,
            accounts=accounts,
            charges=self.charges,
            corrections=self.corrections,
            jobs=self.jobs,
            software=self.software,
            committed_lines=frozenset(self.committed),
        )

    def _genesis(self, body: Genesis) -> None:
        if body.owner != self.site or body.role != "site":
            raise LedgerBroken(f"the ledger of {body.role} {body.owner}, not of site {self.site}")

    def _open_dataset(self, body: DatasetOpened) -> None:
        if standing := self.datasets.get((body.lineage, body.cohort)):
            require_same_terms(body, standing=standing)
        elif any(body.manifest_commitment == other.manifest_commitment for other in self.datasets.values()):
            raise LedgerBroken(f"puts one manifest under account twice, now as {body.lineage}/{body.cohort}")
        self.datasets[body.lineage, body.cohort] = body

    def _plan(self, body: PlanAccepted) -> None:
        job = open_sealed(body.job_envelope.encode(), as_=TrainingJob, signed_by=self.roster.coordinator)
        if job.digest != body.job or job.plan.mode != body.mode or self.site not in job.declared_items:
            raise LedgerBroken("the sealed job is not the one that the entry describes")
        if job.digest in self.jobs:
            raise LedgerBroken(
                f"admits job {job.digest[:16]} a second time; who pays for it was settled the first time"
            )
        self.payers.require_plan(job, body.accounts)
        self.jobs[job.digest] = job
        self.admitted[job.digest] = body.accounts
        self.software[job.digest] = body.software

    def _correct(self, sequence: int, body: Correction) -> None:
        """A correction may pass the ceiling: it tells the truth about what is spent already."""
        if body.account.partner != self.site:
            raise LedgerBroken(f"corrects an account of {body.account.partner}")
        self.payers.dataset(body.account)
        charge_all(self.spending, body)
        self.corrections[sequence] = body

    def _checkpoint(self, sequence: int, body: Checkpoint) -> None:
        if body.owner != COORDINATOR:
            raise LedgerBroken(f"records where the ledger of {body.owner} stood, not the coordinator's")
        head = open_head(body.head.encode(), owner=COORDINATOR, signed_by=self.roster.coordinator)
        before = next(reversed(self.checkpoints.values()), head)
        if head.entries < before.entries:
            raise LedgerBroken(
                f"records {head.entries} entries of the coordinator's ledger, after {before.entries} before"
            )
        self.checkpoints[sequence] = head

    def _reserve(self, entry: Entry, body: Reserve) -> None:
        job = self.jobs.get(body.job)
        place = (body.job, body.purpose, body.round_index, body.attempt)
        if job is None:
            raise LedgerBroken("charges for a job that was never admitted")
        if place in self.places:
            raise LedgerBroken(f"{body.purpose} round {body.round_index} attempt {body.attempt} is charged twice")
        if body.mechanism != job.plan.mechanism(body.purpose):
            raise LedgerBroken("the mechanism is not the one of the job's privacy plan")
        if not 0 <= body.round_index < (job.plan.rounds if body.purpose == "train" else 1):
            raise LedgerBroken(f"{body.purpose} round {body.round_index}: the job's plan has no such round")
        if body.accounts[0].partner != self.site or (body.partition == "test") != (body.purpose == "evaluate"):
            raise LedgerBroken(f"{body.purpose} charges the wrong account")
        if strange := [account for account in body.accounts if account not in self.admitted[body.job]]:
            raise LedgerBroken(f"charges cohort {strange[0].cohort}, which was not admitted to the job")
        self.payers.require_nobody_spared(body, admitted=self.admitted[body.job])
        charge_all(self.spending, body)
        self.places.add(place)
        self.charges[entry.sequence] = Charge(
            reserve=body,
            time=entry.time,
            after={account: self.spending[account] for account in body.accounts},
            composition=self._within_ceilings(body),
            outcome="open",
        )

    def _within_ceilings(self, body: Reserve) -> Composition:
        """How the accounts that ``body`` charged compose, all of them being within the ceiling they were put under."""
        compositions = set()
        for account in body.accounts:
            dataset = self.payers.dataset(account)
            if (body.epsilon_limit, body.delta) != (dataset.epsilon_limit, dataset.delta):
                raise LedgerBroken("the ceiling is not the one that the data set was put under")
            require_within(self.spending[account], ceiling=self.payers.ceiling(account), account=account)
            compositions.add(dataset.composition)
        if len(compositions) != 1:
            raise LedgerBroken("charges accounts that compose differently")
        return compositions.pop()

    def _settle(self, sequence: int, outcome: str, *, place: tuple[str, str, int, int] | None) -> None:
        charge = self.charges.get(sequence)
        if charge is None or charge.outcome != "open":
            raise LedgerBroken(f"settles entry {sequence}, which is no open reservation")
        body = charge.reserve
        if place is not None and place != (body.job, body.purpose, body.round_index, body.attempt):
            raise LedgerBroken(f"settles entry {sequence} for another round than it was reserved for")
        self.charges[sequence] = replace(charge, outcome=outcome)
