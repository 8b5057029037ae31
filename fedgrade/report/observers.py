"""From whom an item is protected, how strongly, and what that allows an attacker: one job at a time."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from fedgrade.federation.verification import FederationProof, JobProof
from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.privacy.attack import AttackBound, bound_from_epsilon, bound_from_rho, bound_from_zcdp_epsilon
from fedgrade.privacy.budget import Spending
from fedgrade.report.words import area_text, delta_text, epsilon_text, share_text

ObserverName = Literal["coordinator", "other_partner", "model_holder", "full_collusion"]
OBSERVERS: tuple[ObserverName, ...] = ("model_holder", "other_partner", "coordinator", "full_collusion")
_GROUPS = (2, 3, 5, 10)

_TITLES: dict[ObserverName, str] = {
    "model_holder": "Whoever gets the model",
    "other_partner": "Another partner",
    "coordinator": "The coordinator",
    "full_collusion": "Everyone else colluding",
}


_SEES: dict[ObserverName, str] = {
    "model_holder": "The published model, or that of every round. The noise of all sites that answered is in each.",
    "other_partner": "The model of every round. It can take its own noise out, not that of the others.",
    "coordinator": "Each site's own uploads, every round. The site's own noise stands in the way.",
    "full_collusion": "The coordinator and all other partners pool what they have. The site's own noise remains.",
}
_SEES_OF_SUMS: dict[ObserverName, str] = {
    **_SEES,
    "coordinator": "The total of each round and every model. Single uploads reach it under masks alone.",
}
_SEES_OF_STEPS: dict[ObserverName, str] = {
    **_SEES,
    "model_holder": "The published model. No reduction is claimed for averaging over sites.",
    "other_partner": "The model of every round. No reduction is claimed for averaging over sites.",
}


@dataclass(frozen=True, kw_only=True)
class ObserverRow:
    """One observer at the site where it learns most."""

    name: ObserverName
    title: str
    sees: str
    epsilon: str
    delta: str
    true_positives: str
    area: str


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One site's epsilons, in the order of :data:`OBSERVERS`."""

    site: str
    declared_items: str
    epsilons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """What the account that is charged most amounts to if one owner has ``items`` in it."""

    items: int
    epsilon: str
    true_positives: str


def observer_rows(job: JobProof) -> tuple[ObserverRow, ...]:
    """The four observers of ``job``, each against the site that it learns most about; none if nothing was charged."""
    return tuple(_observer_row(name, job) for name in OBSERVERS if job.observers)


def site_rows(job: JobProof) -> tuple[SiteRow, ...]:
    """Every charged site's epsilon against every observer."""
    return tuple(
        SiteRow(
            site=site,
            declared_items=f"{job.job.declared_items[site]:,}",
            epsilons=tuple(epsilon_text(getattr(epsilons, name)) for name in OBSERVERS),
        )
        for site, epsilons in sorted(job.observers.items())
    )


def worst_epsilon(job: JobProof, name: ObserverName) -> float:
    """The largest epsilon that any site of ``job`` has against this observer; 0 if nothing was charged."""
    return max((float(getattr(epsilons, name)) for epsilons in job.observers.values()), default=0.0)


def account_bound(spending: Spending, epsilon: float, *, delta: Fraction) -> AttackBound:
    """The strongest attack on an account; Poisson charges leave only (epsilon, delta) to go by."""
    loose = bound_from_epsilon(epsilon, delta=delta)
    if spending.poisson:
        return loose
    tight = bound_from_rho(spending.rho)
    return AttackBound(
        true_positive_rate=min(loose.true_positive_rate, tight.true_positive_rate),
        area_under_curve=min(loose.area_under_curve, tight.area_under_curve),
    )


def group_rows(proof: FederationProof) -> tuple[GroupRow, ...]:
    """What several items of one owner in one account cost together; none where Poisson charges bar the formula.

    A group of k items under rho-zCDP has k² rho (Bun and Steinke 2016, https://arxiv.org/abs/1605.02065, Prop. 1.9).
    """
    accounts = [account for site in proof.sites.values() for account in site.accounts.values()]
    if not accounts or any(account.spending.poisson for account in accounts):
        return ()
    worst = max(accounts, key=lambda account: account.spending.rho)
    rows = []
    for items in _GROUPS:
        rho = items**2 * worst.spending.rho
        bound = bound_from_rho(rho)
        epsilon = zcdp_epsilon(rho, delta=worst.dataset.delta)
        rows.append(
            GroupRow(items=items, epsilon=epsilon_text(epsilon), true_positives=share_text(bound.true_positive_rate))
        )
    return tuple(rows)


def _observer_row(name: ObserverName, job: JobProof) -> ObserverRow:
    epsilon, delta = worst_epsilon(job, name), job.job.plan.delta
    poisson = job.job.plan.mode == "local_sgd"
    bound = (bound_from_epsilon if poisson else bound_from_zcdp_epsilon)(epsilon, delta=delta)
    return ObserverRow(
        name=name,
        title=_TITLES[name],
        sees=(_SEES_OF_SUMS if job.job.plan.mode == "distributed" else _SEES_OF_STEPS if poisson else _SEES)[name],
        epsilon=epsilon_text(epsilon),
        delta=delta_text(delta),
        true_positives=share_text(bound.true_positive_rate),
        area=area_text(bound.area_under_curve),
    )
