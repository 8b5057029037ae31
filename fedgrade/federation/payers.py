"""Who pays for a job and for each of its releases, recomputed from what a site's ledger says and from nothing else.

The same rule that a site charges by: every cohort that it lists pays, but for those whose budget does not bear it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedgrade.errors import BudgetExceeded, LedgerBroken
from fedgrade.job import TrainingJob
from fedgrade.privacy.budget import Ceiling, Spending, require_affordable
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import AccountKey, DatasetOpened, Mechanism, Partition, Reserve

_SIDES: tuple[Partition, ...] = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Payers:
    """The accounts of ``site`` as its ledger has them so far: ``datasets`` and ``spending`` are whoever reads it's."""

    site: SiteId
    datasets: Mapping[tuple[str, str], DatasetOpened]
    spending: Mapping[AccountKey, Spending]
    _exhausted: set[tuple[AccountKey, str, Mechanism, Ceiling]] = field(init=False, default_factory=set)

    def dataset(self, account: AccountKey) -> DatasetOpened:
        """What ``account`` was opened with, as it stands now.

        Raises:
            LedgerBroken: it never was.
        """
        try:
            return self.datasets[account.lineage, account.cohort]
        except KeyError as error:
            raise LedgerBroken(
                f"names {account.lineage}/{account.cohort}, which was never put under account"
            ) from error

    def ceiling(self, account: AccountKey) -> Ceiling:
        """What ``account`` may spend in its life, as it stands now."""
        dataset = self.dataset(account)
        return Ceiling(epsilon=dataset.epsilon_limit, delta=dataset.delta, composition=dataset.composition)

    def require_plan(self, job: TrainingJob, accounts: tuple[AccountKey, ...]) -> None:
        """Return if ``accounts`` are those of the cohorts that the site lists that could bear the whole of ``job``.

        A cohort that the partner no longer lists is rightly absent; one that is there on one side is listed.

        Raises:
            LedgerBroken: an account is missing, or there that must not be.
            BudgetExceeded: one cannot bear the job.
        """
        for account in accounts:
            self.dataset(account)
        if {account.partition for account in accounts} != set(_SIDES):
            raise LedgerBroken("admits a job without an account on each side, for training and held out")
        lineage, cohorts = accounts[0].lineage, {account.cohort for account in accounts}
        own = self._accounts(lineage)
        if len(set(accounts)) != len(accounts) or not set(own).issuperset(accounts):
            raise LedgerBroken("admits an account twice, or one that is not of this site's one data lineage")
        for account in accounts:
            require_affordable(self._after(job, account), ceiling=self.ceiling(account), account=account)
        for account in own:
            if account not in accounts and account.cohort in cohorts and self._could_bear(job, account):
                raise LedgerBroken(
                    f"leaves out the {account.partition} side of cohort {account.cohort}, which could pay for the job"
                )
        self._require_declared(job, lineage, cohorts)

    def require_nobody_spared(self, charge: Reserve, *, admitted: tuple[AccountKey, ...]) -> None:
        """Return if each of ``admitted`` on the side of ``charge`` that is within its ceiling if it pays does pay.

        Spending only grows, so an account that cannot pay for a mechanism under a ceiling never will: that is computed
        once, and not at every charge.

        Raises:
            LedgerBroken: one is spared.
        """
        for account in admitted:
            if account.partition != charge.partition or account in charge.accounts:
                continue
            ceiling = self.ceiling(account)
            known = (account, charge.job, charge.mechanism, ceiling)
            if known in self._exhausted:
                continue
            after = self._spent(account).charged(charge.mechanism, job=charge.job)
            if _is_within(after, ceiling=ceiling, account=account):
                raise LedgerBroken(
                    f"{charge.purpose} round {charge.round_index} spares cohort {account.cohort}, which was admitted "
                    "to the job and could pay"
                )
            self._exhausted.add(known)

    def _require_declared(self, job: TrainingJob, lineage: str, cohorts: set[str]) -> None:
        """Return if ``cohorts``, and others that could not pay, may be all that the site listed when it took ``job``.

        Which those are no entry says; but a site takes part only in a job that states the declared items of them all.
        """
        stated, named = job.declared_items[self.site], self._declared(lineage, cohorts)
        if stated == named:
            return
        absent = [account for account in self._accounts(lineage) if account.cohort not in cohorts]
        able = {account.cohort for account in absent if self._could_bear(job, account)}
        exhausted = self._declared(lineage, {account.cohort for account in absent} - able)
        if not named < stated <= named + exhausted:
            raise LedgerBroken(
                f"admits cohorts of {named} declared items to a job that states {stated} for this site, and those that "
                f"could not pay have {exhausted}: a cohort that could was left out, or one named that was not listed"
            )

    def _declared(self, lineage: str, cohorts: set[str]) -> int:
        return sum(self.datasets[lineage, cohort].declared_items for cohort in cohorts)

    def _accounts(self, lineage: str) -> list[AccountKey]:
        """Both accounts of every cohort of ``lineage``."""
        return [
            AccountKey(partner=self.site, lineage=lineage, cohort=cohort, partition=partition, unit=dataset.unit)
            for (of, cohort), dataset in self.datasets.items()
            if of == lineage
            for partition in _SIDES
        ]

    def _spent(self, account: AccountKey) -> Spending:
        return self.spending.get(account, Spending())

    def _after(self, job: TrainingJob, account: AccountKey) -> Spending:
        """What ``account`` will have spent after the whole of ``job``."""
        charge = job.plan.charge_training if account.partition == "train" else job.plan.charge_evaluation
        return charge(self._spent(account), job=job.digest)

    def _could_bear(self, job: TrainingJob, account: AccountKey) -> bool:
        return _is_within(self._after(job, account), ceiling=self.ceiling(account), account=account)


def _is_within(spending: Spending, *, ceiling: Ceiling, account: AccountKey) -> bool:
    """Whether ``account`` can pay, by the rule that its site goes by."""
    try:
        require_affordable(spending, ceiling=ceiling, account=account)
    except BudgetExceeded:
        return False
    return True
