"""What one site's ledger proves on its own: every charge recomputed, every ceiling kept, every release paid for."""

from dataclasses import dataclass, field
from pathlib import Path

from fedgrade.errors import FedgradeError, LedgerBroken
from fedgrade.federation.charging import require_same_terms
from fedgrade.job import TrainingJob
from fedgrade.privacy.budget import Ceiling, Spending, require_within
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import open_sealed
from fedgrade.trust.identity import Roster, SiteId
from fedgrade.trust.ledger import GENESIS_PREVIOUS, Entry, read_lines
from fedgrade.trust.records import (
    Abort,
    AccountKey,
    Body,
    Commit,
    DatasetOpened,
    Genesis,
    Partition,
    PlanAccepted,
    Released,
    Reserve,
    RoundClosed,
)
from fedgrade.trust.transparency import MerkleTree


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One reservation, when it was made, and the account's total epsilon right after it."""

    reserve: Reserve
    time: str
    epsilon_after: float
    outcome: str  # "committed", "aborted" or "open"


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
    :class:`~fedgrade.trust.transparency.TreeHead`; either stands for the whole ledger.
    """

    site: SiteId
    entries: int
    head: str
    root: str
    accounts: dict[AccountKey, AccountProof]
    charges: dict[int, Charge]
    jobs: dict[str, TrainingJob]
    committed_lines: frozenset[str]

    def job_epsilon(self, job: str, *, partition: Partition) -> float:
        """Epsilon that one job alone cost this site's items on one side, at the account's own delta."""
        spending, dataset = Spending(), None
        for charge in self.charges.values():
            if charge.reserve.job == job and charge.reserve.account.partition == partition:
                spending = spending.charged(charge.reserve.mechanism, job=job)
                dataset = self.accounts[charge.reserve.account].dataset
        if dataset is None:
            return 0.0
        return spending.epsilon(delta=dataset.delta, composition=dataset.composition)


def prove_site(path: Path, *, site: SiteId, roster: Roster) -> SiteProof:
    """What the ledger at ``path`` proves about ``site``.

    Raises:
        LedgerBroken: names the first entry that is not what it must be.
    """
    reading = _Reading(site=site, roster=roster)
    head, tree = GENESIS_PREVIOUS, MerkleTree()
    for line, entry in read_lines(path, key=roster.key_of(site)):
        head, tree = digest(line), tree.after(line)
        try:
            reading.take(entry, line_digest=head)
        except FedgradeError as error:
            raise LedgerBroken(f"ledger {path}: entry {entry.sequence}: {error}") from error
    if tree.entries == 0:
        raise LedgerBroken(f"ledger {path}: is empty; a ledger begins with a genesis entry")
    return reading.proof(head=head, tree=tree)


@dataclass
class _Reading:
    """The fold over one ledger: the rules of which entry may follow which live here and nowhere else."""

    site: SiteId
    roster: Roster
    datasets: dict[tuple[str, str], DatasetOpened] = field(default_factory=dict)
    spending: dict[AccountKey, Spending] = field(default_factory=dict)
    jobs: dict[str, TrainingJob] = field(default_factory=dict)
    charges: dict[int, Charge] = field(default_factory=dict)
    places: set[tuple[str, str, int, int]] = field(default_factory=set)
    committed: set[str] = field(default_factory=set)

    def take(self, entry: Entry, *, line_digest: str) -> None:
        body: Body = entry.body
        match body:
            case Genesis():
                self._genesis(body)
            case DatasetOpened():
                if standing := self.datasets.get((body.lineage, body.cohort)):
                    require_same_terms(body, standing=standing)
                elif any(body.manifest_commitment == other.manifest_commitment for other in self.datasets.values()):
                    raise LedgerBroken(f"puts one manifest under account twice, now as {body.lineage}/{body.cohort}")
                self.datasets[body.lineage, body.cohort] = body
            case PlanAccepted():
                self._plan(body)
            case Reserve():
                self._reserve(entry, body)
            case Commit():
                self._settle(body.reserve, "committed", place=(body.job, body.purpose, body.round_index, body.attempt))
                self.committed.add(line_digest)
            case Abort():
                self._settle(body.reserve, "aborted", place=None)
            case RoundClosed() | Released():
                raise LedgerBroken("a coordinator's entry in a site's ledger")

    def proof(self, *, head: str, tree: MerkleTree) -> SiteProof:
        accounts = {
            account: AccountProof(
                dataset=self._dataset(account),
                spending=spending,
                epsilon=spending.epsilon(
                    delta=self._dataset(account).delta, composition=self._dataset(account).composition
                ),
            )
            for account, spending in self.spending.items()
        }
        return SiteProof(
            site=self.site,
            entries=tree.entries,
            head=head,
            root=tree.root.hex(),
            accounts=accounts,
            charges=self.charges,
            jobs=self.jobs,
            committed_lines=frozenset(self.committed),
        )

    def _genesis(self, body: Genesis) -> None:
        if body.owner != self.site or body.role != "site":
            raise LedgerBroken(f"the ledger of {body.role} {body.owner}, not of site {self.site}")

    def _plan(self, body: PlanAccepted) -> None:
        job = open_sealed(body.job_envelope.encode(), as_=TrainingJob, signed_by=self.roster.coordinator)
        if job.digest != body.job or job.plan.mode != body.mode or self.site not in job.declared_items:
            raise LedgerBroken("the sealed job is not the one that the entry describes")
        self.jobs[job.digest] = job

    def _reserve(self, entry: Entry, body: Reserve) -> None:
        job = self.jobs.get(body.job)
        place = (body.job, body.purpose, body.round_index, body.attempt)
        if job is None:
            raise LedgerBroken("charges for a job that was never admitted")
        if place in self.places:
            raise LedgerBroken(f"{body.purpose} round {body.round_index} attempt {body.attempt} is charged twice")
        if body.mechanism != job.plan.mechanism(body.purpose):
            raise LedgerBroken("the mechanism is not the one of the job's privacy plan")
        if body.account.partner != self.site or (body.account.partition == "test") != (body.purpose == "evaluate"):
            raise LedgerBroken(f"{body.purpose} charges the wrong account")
        dataset = self._dataset(body.account)
        if (body.epsilon_limit, body.delta) != (dataset.epsilon_limit, dataset.delta):
            raise LedgerBroken("the ceiling is not the one that the data set was put under")
        spending = self.spending.get(body.account, Spending()).charged(body.mechanism, job=body.job)
        ceiling = Ceiling(epsilon=dataset.epsilon_limit, delta=dataset.delta, composition=dataset.composition)
        after = require_within(spending, ceiling=ceiling, account=body.account)
        self.places.add(place)
        self.spending[body.account] = spending
        self.charges[entry.sequence] = Charge(reserve=body, time=entry.time, epsilon_after=after, outcome="open")

    def _settle(self, sequence: int, outcome: str, *, place: tuple[str, str, int, int] | None) -> None:
        charge = self.charges.get(sequence)
        if charge is None or charge.outcome != "open":
            raise LedgerBroken(f"settles entry {sequence}, which is no open reservation")
        body = charge.reserve
        if place is not None and place != (body.job, body.purpose, body.round_index, body.attempt):
            raise LedgerBroken(f"settles entry {sequence} for another round than it was reserved for")
        self.charges[sequence] = Charge(
            reserve=body, time=charge.time, epsilon_after=charge.epsilon_after, outcome=outcome
        )

    def _dataset(self, account: AccountKey) -> DatasetOpened:
        try:
            return self.datasets[account.lineage, account.cohort]
        except KeyError as error:
            raise LedgerBroken(
                f"charges {account.lineage}/{account.cohort}, which was never put under account"
            ) from error
