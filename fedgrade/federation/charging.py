"""A site's ledger and what follows from it: what is spent, what was already asked, and the charge before the release.

The only way to a release is :meth:`Charging.reserve` before any photo is read, then :meth:`Charging.commit`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

from fedgrade.errors import AlreadyCharged, BudgetExceeded, LedgerBroken, MessageRefused, PolicyViolated
from fedgrade.job import TrainingJob
from fedgrade.privacy.budget import Ceiling, Spending, charge_all, require_affordable
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.ledger import Appended, Entry, LedgerWriter
from fedgrade.trust.records import (
    COORDINATOR,
    Abort,
    AccountKey,
    Checkpoint,
    Commit,
    Correction,
    DatasetOpened,
    Mechanism,
    Partition,
    PlanAccepted,
    Purpose,
    Reserve,
)
from fedgrade.trust.software import running_software
from fedgrade.trust.transparency import TreeHead

logger = logging.getLogger(__name__)

Clock = Callable[[], datetime]


def require_same_terms(dataset: DatasetOpened, *, standing: DatasetOpened) -> None:
    """Return if ``dataset`` may follow ``standing``, the entry on record for the same lineage and cohort.

    The partner may move its own ceiling, on the record; what the photos are and how they add up may not move.

    Raises:
        LedgerBroken: names the first term that did.
    """
    same_terms = replace(dataset, epsilon_limit=standing.epsilon_limit, delta=standing.delta)
    changed = [name for name in vars(standing) if getattr(same_terms, name) != getattr(standing, name)]
    if changed == ["composition"]:
        raise LedgerBroken(
            f"data {dataset.lineage}/{dataset.cohort}: is under account as {standing.composition} for life, and "
            f"policy.modes now asks for {dataset.composition}; put policy.modes back to what they were"
        )
    if changed:
        raise LedgerBroken(
            f"data {dataset.lineage}/{dataset.cohort}: {changed[0]} differs from what the ledger has on record; put "
            "the manifest back, and list new items alone in a new cohort"
        )


def require_company(job: TrainingJob, *, items: int, policy_minimum: int) -> None:
    """Return if the cohorts that pay for a release hold enough declared ``items`` together to hide among.

    Raises:
        PolicyViolated: fewer than the partner's policy, or the job itself, asks for.
    """
    limits = {"policy.minimum_items": policy_minimum, "data.minimum_items": job.spec.data.minimum_items}
    name, minimum = max(limits.items(), key=lambda limit: limit[1])
    if items < minimum:
        raise PolicyViolated(
            f"job {job.spec.name}: only {items} declared items have budget left for it; {name} is {minimum}; wait for "
            "a new ingestion cohort"
        )


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request for a release: its place in a job. Ordered as a job goes."""

    job: str
    purpose: Purpose
    round_index: int
    attempt: int

    @property
    def stage(self) -> tuple[int, int]:
        """Where in the job this is: centring, then training rounds, then evaluation."""
        return ("centre", "train", "evaluate").index(self.purpose), self.round_index


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """A charge that is on disk: its place in the ledger, and the accounts that paid."""

    sequence: int
    accounts: tuple[AccountKey, ...]


class Charging:
    """The accounts of one site, folded from its own ledger, which it alone writes."""

    def __init__(self, *, site: SiteId, clock: Clock) -> None:
        self._site = site
        self._clock = clock
        self._writer: LedgerWriter
        self._spending: dict[AccountKey, Spending] = {}
        self._datasets: dict[tuple[str, str], DatasetOpened] = {}
        self._plans: dict[str, PlanAccepted] = {}
        self._attempts: dict[tuple[str, tuple[int, int]], list[int]] = {}
        self._latest: dict[str, tuple[int, int]] = {}
        self._checkpoint = ""

    @classmethod
    def open(cls, path: Path, *, site: SiteId, key: SigningKey, clock: Clock) -> Self:
        """The accounts in the ledger at ``path``, which this process now holds; a new one is begun.

        Raises:
            LedgerUnavailable: another process writes it, or the disk refuses.
            LedgerBroken: it does not verify.
        """
        charging = cls(site=site, clock=clock)
        charging._writer = LedgerWriter.open(path, key=key, observe=charging._observe)
        charging._writer.start(owner=site, role="site", now=clock())
        return charging

    @property
    def opened(self) -> frozenset[str]:
        """Names ``lineage/cohort`` of what is under account."""
        return frozenset(f"{lineage}/{cohort}" for lineage, cohort in self._datasets)

    @property
    def datasets(self) -> tuple[DatasetOpened, ...]:
        """What is under account, on the terms that stand."""
        return tuple(self._datasets.values())

    def open_dataset(self, dataset: DatasetOpened) -> None:
        """Put ``dataset`` under account, or confirm that it is, on the terms it was opened with.

        Raises:
            LedgerBroken: the same lineage and cohort stand in the ledger with other photos.
        """
        self.require_standing(dataset)
        if self._datasets.get((dataset.lineage, dataset.cohort)) != dataset:
            self._append(dataset)

    def require_standing(self, dataset: DatasetOpened) -> None:
        """Return if ``dataset`` is new, or may follow what the ledger has on it; writes nothing.

        Raises:
            LedgerBroken: the same lineage and cohort stand in the ledger with other photos.
        """
        standing = self._datasets.get((dataset.lineage, dataset.cohort))
        if standing is not None:
            require_same_terms(dataset, standing=standing)

    def accept(self, job: TrainingJob, *, envelope: str, accounts: tuple[AccountKey, ...]) -> None:
        """Record that this site takes part in ``job``, and which accounts may pay for it; once."""
        if job.digest not in self._plans:
            self._append(
                PlanAccepted(
                    job=job.digest,
                    job_envelope=envelope,
                    mode=job.plan.mode,
                    participants=len(job.participants),
                    accounts=accounts,
                    software=running_software(),
                )
            )

    def accepted(self, job_digest: str) -> PlanAccepted:
        """What the ledger has on the job that was admitted under this digest.

        Raises:
            MessageRefused: no such job was admitted here.
        """
        if job_digest not in self._plans:
            raise MessageRefused(f"job {job_digest[:16]}: was never admitted by this site; send it first")
        return self._plans[job_digest]

    @property
    def sealed_head(self) -> str:
        """Where this ledger stands, signed by the site."""
        return self._writer.sealed_head(owner=self._site).decode()

    @property
    def checkpoint(self) -> str:
        """The newest head of the coordinator's ledger on record, as it sealed it; empty before the first."""
        return self._checkpoint

    def require_begins_with(self, seen: TreeHead) -> None:
        """Return if this ledger is the one that ``seen`` is a head of, with nothing but entries added at its end.

        Raises:
            LedgerBroken: it is an older copy, or another history.
        """
        tree = self._writer.tree
        if tree.entries < seen.entries or tree.root(seen.entries).hex() != seen.root:
            raise LedgerBroken(
                f"ledger {self._writer.path}: has {tree.entries} entries, and the coordinator has seen {seen.entries} "
                f"of it under root {seen.root[:16]}: this is an older copy, or was rewritten; restore the newest copy; "
                "nothing was charged"
            )

    def growth_since(self, entries: int) -> tuple[str, ...]:
        """The proof, in hexadecimal, that this ledger begins with its first ``entries`` entries."""
        return tuple(node.hex() for node in self._writer.tree.consistency(older=entries))

    def witness(self, sealed_head: str) -> None:
        """Record where the coordinator's ledger stands, unless that is on record."""
        if sealed_head != self._checkpoint:
            self._append(Checkpoint(owner=COORDINATOR, head=sealed_head))

    def account(self, dataset: DatasetOpened, *, partition: Partition) -> AccountKey:
        """The account that pays for releases about one side of one cohort."""
        return AccountKey(
            partner=self._site, lineage=dataset.lineage, cohort=dataset.cohort, partition=partition, unit=dataset.unit
        )

    def spending(self, account: AccountKey) -> Spending:
        """What ``account`` has been charged so far."""
        return self._spending.get(account, Spending())

    def has_begun(self, job: str) -> bool:
        """Whether anything was charged for ``job``."""
        return job in self._latest

    def require_fresh(self, ask: Ask, *, maximum_attempts: int) -> None:
        """Return if ``ask`` comes after everything this job has asked for.

        Raises:
            AlreadyCharged: this attempt was asked before.
            MessageRefused: something later was asked before, or the policy allows no further attempt.
        """
        latest = self._latest.get(ask.job)
        if latest is not None and ask.stage < latest:
            raise MessageRefused(f"{ask.purpose} round {ask.round_index}: this job has moved on")
        charged = self._attempts.get((ask.job, ask.stage), [])
        if charged and ask.attempt <= charged[-1]:
            raise AlreadyCharged(
                f"{ask.purpose} round {ask.round_index}: attempt {ask.attempt} was already charged; ask for "
                f"attempt {charged[-1] + 1}"
            )
        # Charges are counted: a secure sum that somebody stayed away from has used up a number and nothing else.
        if len(charged) >= maximum_attempts:
            raise MessageRefused(
                f"{ask.purpose} round {ask.round_index}: was charged {len(charged)} times; policy.maximum_attempts is "
                f"{maximum_attempts}"
            )

    def reserve(
        self,
        ask: Ask,
        *,
        accounts: tuple[AccountKey, ...],
        mechanism: Mechanism,
        ceiling: Ceiling,
        weights_digest: str,
        transcript: str = "",
    ) -> Reserved:
        """Charge one release, durably, before anything is computed, to each of ``accounts`` that can still pay.

        An exhausted cohort drops out and does not stop the others. Who can pay follows from the ledger alone, so that
        it says nothing about any item. ``transcript`` is that of the secure sum in which the release leaves, if any.

        Raises:
            BudgetExceeded: none can; nothing was charged.
            LedgerUnavailable: it could not be written; nothing was charged.
        """
        paying = self.payers(ask, accounts=accounts, mechanism=mechanism, ceiling=ceiling)
        body = Reserve(
            job=ask.job,
            round_index=ask.round_index,
            attempt=ask.attempt,
            purpose=ask.purpose,
            accounts=paying,
            mechanism=mechanism,
            weights_digest=weights_digest,
            transcript=transcript,
            epsilon_limit=ceiling.epsilon,
            delta=ceiling.delta,
        )
        return Reserved(sequence=self._append(body).sequence, accounts=paying)

    def payers(
        self, ask: Ask, *, accounts: tuple[AccountKey, ...], mechanism: Mechanism, ceiling: Ceiling
    ) -> tuple[AccountKey, ...]:
        """Those of ``accounts`` that :meth:`reserve` would charge for one release; charges nothing.

        Raises:
            BudgetExceeded: none can pay.
        """
        return self.solvent(accounts, ceiling=ceiling, charge=lambda spending: spending.charged(mechanism, job=ask.job))

    def solvent(
        self, accounts: tuple[AccountKey, ...], *, ceiling: Ceiling, charge: Callable[[Spending], Spending]
    ) -> tuple[AccountKey, ...]:
        """Those of ``accounts`` that stay within ``ceiling`` after ``charge``.

        Raises:
            BudgetExceeded: none does; says so of the first.
        """
        refusals: list[BudgetExceeded] = []
        paying: list[AccountKey] = []
        for account in accounts:
            try:
                require_affordable(charge(self.spending(account)), ceiling=ceiling, account=account)
                paying.append(account)
            except BudgetExceeded as error:
                refusals.append(error)
                logger.warning("cohort %s stays out: %s", account.cohort, error)
        if not paying:
            raise refusals[0]
        return tuple(paying)

    def commit(self, ask: Ask, *, reserved: Reserved, message_digest: str) -> Appended:
        """Record what the reserved release became. The returned line is the receipt."""
        return self._append(
            Commit(
                reserve=reserved.sequence,
                job=ask.job,
                round_index=ask.round_index,
                attempt=ask.attempt,
                purpose=ask.purpose,
                message_digest=message_digest,
            )
        )

    def abort(self, *, reserved: Reserved, reason: str) -> None:
        """Record that the reserved release will not happen. The charge stands."""
        self._append(Abort(reserve=reserved.sequence, reason=reason))

    def correct(self, account: AccountKey, *, rho: Fraction, reason: str) -> float:
        """Put on record that ``account`` spent ``rho`` more than was charged; its epsilon from here on.

        Raises:
            LedgerBroken: no such cohort is under account.
            DocumentRefused: ``rho`` is not positive, or the reason is none.
        """
        dataset = self._datasets.get((account.lineage, account.cohort))
        if dataset is None:
            known = ", ".join(sorted(self.opened)) or "none yet"
            raise LedgerBroken(
                f"ledger {self._writer.path}: {account.lineage}/{account.cohort} is not under account; known: {known}"
            )
        self._append(Correction(account=account, rho=rho, reason=reason))
        return self.spending(account).epsilon(delta=dataset.delta, composition=dataset.composition)

    def close(self) -> None:
        """Give the ledger up."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _append(
        self, body: DatasetOpened | PlanAccepted | Reserve | Commit | Abort | Correction | Checkpoint
    ) -> Appended:
        appended = self._writer.append(body, now=self._clock())
        self._fold(body)
        return appended

    def _observe(self, entry: Entry) -> None:
        self._fold(entry.body)

    def _fold(self, body: object) -> None:
        match body:
            case DatasetOpened():
                self._datasets[body.lineage, body.cohort] = body
            case PlanAccepted():
                self._plans[body.job] = body
            case Correction():
                charge_all(self._spending, body)
            case Reserve():
                charge_all(self._spending, body)
                ask = Ask(job=body.job, purpose=body.purpose, round_index=body.round_index, attempt=body.attempt)
                self._attempts.setdefault((body.job, ask.stage), []).append(body.attempt)
                self._latest[body.job] = ask.stage
            case Checkpoint():
                self._checkpoint = body.head
            case _:
                pass
