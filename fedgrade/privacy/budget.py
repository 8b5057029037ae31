"""What has been spent on whose items, read off ledger entries; and the refusal to spend more than the partner allows.

The same fold serves the partner's node before a release and the compliance laptop years later, so they cannot
disagree. Budgets last for the life of the data: across rounds, runs, models and restarts.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from fedgrade.errors import BudgetExceeded, PlanRefused
from fedgrade.privacy.accounting import poisson_epsilon, printed, zcdp_epsilon, zcdp_rho
from fedgrade.trust.records import (
    AccountKey,
    Composition,
    Correction,
    DiscreteGaussian,
    Mechanism,
    PoissonGaussian,
    Reserve,
)

_HIGHEST_CEILING = Fraction(1000)


@dataclass(frozen=True, kw_only=True)
class PoissonJob:
    """Poisson steps paid for together when the first of them was charged; ``charged_steps`` of them had to be done.

    A job's plan is one, and so is every release beyond the plan: a round asked anew.
    """

    job: str
    sampling_rate: Fraction
    noise_multiplier: Fraction
    planned_steps: int
    charged_steps: int

    def plans(self, mechanism: PoissonGaussian, *, job: str) -> bool:
        """Whether this was paid for ``job`` by a release that named the same plan as ``mechanism``."""
        mine = (self.job, self.sampling_rate, self.noise_multiplier, self.planned_steps)
        return mine == (job, mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.planned_steps)


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Everything one account has been charged: exact rho, and Poisson jobs in the order they began."""

    rho: Fraction = Fraction(0)
    poisson: tuple[PoissonJob, ...] = ()

    def charged(self, mechanism: Mechanism, *, job: str) -> "Spending":
        """This spending after one more release."""
        match mechanism:
            case DiscreteGaussian():
                return replace(self, rho=self.rho + mechanism.rho)
            case PoissonGaussian():
                return replace(self, poisson=_paid(self.poisson, mechanism, job=job))

    def epsilon(self, *, delta: Fraction, composition: Composition) -> float:
        """The epsilon at ``delta`` of everything charged so far, never below the truth.

        Under ``zcdp`` all of ``delta`` converts rho. Under ``mixed`` half does, and the k-th Poisson job (k = 1, 2, …)
        has delta / 2^(k+1); these shares sum to less than ``delta``. A job's epsilon and share are fixed when it begins
        and cover all its planned steps, so that it does not matter whether it is abandoned in view of its results,
        nor what is asked in between: the filter of Rogers et al. (2016), https://arxiv.org/abs/1605.08294, over
        interactive mechanisms side by side (Haney et al. 2023, https://arxiv.org/abs/2309.05901). Rho adds up fully
        adaptively (Whitehouse et al. 2023, https://arxiv.org/abs/2203.05481) against a bound fixed in advance, the
        ceiling. Not proved: that this number itself, rather than the ceiling, holds at ``delta`` for rho that was
        spent until a moment chosen in view of results; nor the ceiling of a ``mixed`` account whose division between
        rho and Poisson jobs was chosen so.

        Raises:
            PlanRefused: a Poisson job is charged to a ``zcdp`` account, or shares of delta have become too small.
        """
        if composition == "zcdp":
            if self.poisson:
                raise PlanRefused("a zcdp account holds a Poisson job; such jobs need an account opened as mixed")
            return zcdp_epsilon(self.rho, delta=delta)
        total = zcdp_epsilon(self.rho, delta=delta / 2)
        for position, paid in enumerate(self.poisson, start=1):
            steps = {(paid.sampling_rate, paid.noise_multiplier): paid.planned_steps}
            total += poisson_epsilon(steps, delta=delta / 2 ** (position + 1))
        return total


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The partner's own limit on one account, for the life of the data."""

    epsilon: Fraction
    delta: Fraction
    composition: Composition


def charge_all(accounts: dict[AccountKey, Spending], entry: Reserve | Correction) -> None:
    """Add the cost of ``entry`` to every account that pays for it, whether or not a release then happens.

    The one fold of charges: the partner's node, its budget command and the compliance laptop all go through it.
    """
    match entry:
        case Reserve():
            for account in entry.accounts:
                accounts[account] = accounts.get(account, Spending()).charged(entry.mechanism, job=entry.job)
        case Correction():
            standing = accounts.get(entry.account, Spending())
            accounts[entry.account] = replace(standing, rho=standing.rho + entry.rho)


def require_within(spending: Spending, *, ceiling: Ceiling, account: AccountKey) -> None:
    """Return if ``spending`` is within ``ceiling``.

    Raises:
        BudgetExceeded: it is not; nothing may be released.
        PlanRefused: the account cannot express what was charged to it.
    """
    if not spending.poisson and ceiling.composition == "zcdp" and spending.rho <= _admitted_rho(ceiling):
        # Epsilon grows with rho: no need to solve for it at every one of a ledger's charges.
        return
    after = spending.epsilon(delta=ceiling.delta, composition=ceiling.composition)
    if after > ceiling.epsilon:
        raise BudgetExceeded(
            f"account {account.partner}/{account.lineage}/{account.cohort}/{account.partition}: epsilon would reach "
            f"{printed(after)}, the partner's ceiling is {float(ceiling.epsilon):.2f}; lower privacy.target_epsilon, "
            "or wait for a new ingestion cohort"
        )


def require_affordable(spending: Spending, *, ceiling: Ceiling, account: AccountKey) -> None:
    """Return if ``account`` can bear ``spending``.

    Raises:
        BudgetExceeded: it would pass ``ceiling``, or has no share of delta left for one more Poisson job.
    """
    try:
        require_within(spending, ceiling=ceiling, account=account)
    except PlanRefused as error:
        # An account that cannot state its epsilon is as exhausted as one that would pass its ceiling.
        raise BudgetExceeded(
            f"account {account.partner}/{account.lineage}/{account.cohort}/{account.partition}: cannot bear it, "
            f"because {error}; wait for a new ingestion cohort"
        ) from error


def _paid(jobs: tuple[PoissonJob, ...], mechanism: PoissonGaussian, *, job: str) -> tuple[PoissonJob, ...]:
    """``jobs`` after one more release of ``job``: within what was paid for, or paid for now."""
    begun = False
    for position, paid in enumerate(jobs):
        if paid.plans(mechanism, job=job):
            begun = True
            charged = paid.charged_steps + mechanism.steps
            if charged <= paid.planned_steps:
                return (*jobs[:position], replace(paid, charged_steps=charged), *jobs[position + 1 :])
    return (
        *jobs,
        PoissonJob(
            job=job,
            sampling_rate=mechanism.sampling_rate,
            noise_multiplier=mechanism.noise_multiplier,
            planned_steps=mechanism.steps if begun else mechanism.planned_steps,
            charged_steps=mechanism.steps,
        ),
    )


@lru_cache(maxsize=1024)
def _admitted_rho(ceiling: Ceiling) -> Fraction:
    """A rho that a ``zcdp`` ceiling admits: all that it does, but for ceilings too high to mean anything."""
    return zcdp_rho(min(ceiling.epsilon, _HIGHEST_CEILING), delta=ceiling.delta)
