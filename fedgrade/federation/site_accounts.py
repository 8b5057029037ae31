"""Which of a site's cohorts pay for a job and for each of its releases, by the partner's policy and its own ledger."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedgrade.data.manifest import Split
from fedgrade.errors import LedgerBroken
from fedgrade.federation.charging import Ask, Charging, require_company
from fedgrade.federation.holdings import Holdings
from fedgrade.federation.members import Members
from fedgrade.federation.policy import Policy
from fedgrade.federation.releases import SiteRows
from fedgrade.job import TrainingJob
from fedgrade.trust.records import AccountKey, Partition


@dataclass(frozen=True, kw_only=True)
class OpenJob:
    """A job that was admitted, what this site holds for it, and the rows loaded so far, by side and cohorts."""

    job: TrainingJob
    holdings: Holdings
    rows: dict[tuple[Split, frozenset[str]], SiteRows] = field(default_factory=dict, repr=False)


class SiteAccounts:
    """The accounts of one site's cohorts: put under account once, asked for every job and release."""

    def __init__(self, charging: Charging, *, members: Path, secret: bytes, lineage: str) -> None:
        self._charging = charging
        self._members = Members(members, secret=secret)
        self._lineage = lineage

    def require_apart(self, holdings: Holdings) -> Mapping[str, frozenset[str]]:
        """Who is in which cohort, if all of ``holdings`` may stand beside what is under account; writes nothing.

        Raises:
            LedgerBroken: terms differ from those on record, or an item would get a second budget.
        """
        for holding in holdings.cohorts.values():
            self._charging.require_standing(holding.dataset)
        manifests = {cohort: holding.manifest for cohort, holding in holdings.cohorts.items()}
        return self._members.require_apart(manifests, lineage=self._lineage, opened=self._charging.opened)

    def put_under_account(self, holdings: Holdings, members: Mapping[str, frozenset[str]]) -> None:
        """Open an account for each cohort that has none, or confirm that its terms still stand."""
        # Members first: after a crash in between, a cohort that the ledger does not know is simply listed anew.
        self._members.keep(members)
        for holding in holdings.cohorts.values():
            self._charging.open_dataset(holding.dataset)

    def affordable(self, opened: OpenJob, policy: Policy) -> tuple[AccountKey, ...]:
        """The accounts whose lifetime budget bears the whole job; the others stay out of it.

        Raises:
            BudgetExceeded: on one side none does; nothing is spent on a job that could not be finished.
            PolicyViolated: too few items are left to hide among.
        """
        plan, job, ceiling = opened.job.plan, opened.job.digest, policy.ceiling
        if self._charging.has_begun(job):
            # Shown again by a coordinator that resumes: part of the plan is in the spending already, and what is left
            # meets the ceiling at each reservation.
            return self._charging.accepted(job).accounts
        train = self._charging.solvent(
            self._accounts(opened, "train"),
            ceiling=ceiling,
            charge=lambda spending: plan.charge_training(spending, job=job),
        )
        test = self._charging.solvent(
            self._accounts(opened, "test"),
            ceiling=ceiling,
            charge=lambda spending: plan.charge_evaluation(spending, job=job),
        )
        for side in (train, test):
            _require_company(opened, side, policy)
        return train + test

    def payers(self, opened: OpenJob, ask: Ask, policy: Policy) -> tuple[AccountKey, ...]:
        """The accounts admitted to the job that can pay for ``ask``, as the ledger has it.

        Raises:
            LedgerBroken: one of those admitted is of a cohort that is listed no more.
            BudgetExceeded: none can.
            PolicyViolated: too few items are left to hide among.
        """
        partition: Partition = "test" if ask.purpose == "evaluate" else "train"
        admitted = self._charging.accepted(ask.job).accounts
        accounts = tuple(account for account in admitted if account.partition == partition)
        for account in accounts:
            # Nobody's items may be read at the expense of others.
            if account not in self._accounts(opened, partition):
                raise LedgerBroken(
                    f"data {account.lineage}/{account.cohort}: was admitted to job {opened.job.spec.name} and is "
                    "listed no more; list it again, or let the job end without this site"
                )
        mechanism = opened.job.plan.mechanism(ask.purpose)
        paying = self._charging.payers(ask, accounts=accounts, mechanism=mechanism, ceiling=policy.ceiling)
        # Attempts beyond the plan use budget up, so that a few items may be left alone in mid-job.
        _require_company(opened, paying, policy)
        return paying

    def _accounts(self, opened: OpenJob, partition: Partition) -> tuple[AccountKey, ...]:
        """The accounts of every cohort on one side."""
        return tuple(
            self._charging.account(holding.dataset, partition=partition)
            for _, holding in sorted(opened.holdings.cohorts.items())
        )


def _require_company(opened: OpenJob, paying: tuple[AccountKey, ...], policy: Policy) -> None:
    """Refuse what only cohorts with too few items together can pay for."""
    items = opened.holdings.declared_items(frozenset(account.cohort for account in paying))
    require_company(opened.job, items=items, policy_minimum=policy.minimum_items)
