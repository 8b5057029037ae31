"""What a job would cost, leave and be refused for, told before anything runs. Reads no photo and writes no ledger.

The rules asked are the ones that decide when the job comes: a site's policy through :func:`policy.admit`, its accounts
through :func:`budget.require_affordable`, its terms through :func:`charging.require_same_terms`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from types import MappingProxyType

import numpy as np

from fedgrade.errors import FedgradeError
from fedgrade.evaluation import ConfusionCounts, GradingMetrics, metrics
from fedgrade.federation.charging import require_company, require_same_terms
from fedgrade.federation.policy import Policy, admit, require_coordinator
from fedgrade.federation.site_proof import SiteProof
from fedgrade.federation.verification import FederationProof
from fedgrade.grading import GradeScale
from fedgrade.job import TrainingJob
from fedgrade.privacy.attack import AttackBound, bound_from_epsilon, bound_from_zcdp_epsilon
from fedgrade.privacy.budget import Ceiling, Spending, require_affordable
from fedgrade.privacy.grid import from_grid
from fedgrade.privacy.plan import ObserverEpsilons, PrivacyPlan, observer_epsilons
from fedgrade.trust.identity import PublicKey, SiteId
from fedgrade.trust.records import AccountKey, Composition, DatasetOpened, Partition

_PARTITIONS: tuple[Partition, ...] = ("train", "test")
_DRAWS, _FALL_OFF = 1000, 4.0  # of noise; how much rarer a decision of a made-up table is, a step further from truth
_GAUSSIAN_POINTS, _POISSON_POINTS = 60, 8  # of a path; one with Poisson steps takes a second each


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One site before the job, as its own files have it.

    Attributes:
        policy: its policy file; None where only its ledger, or nothing, is at hand.
        proof: what its ledger proves; None where it has none yet.
        lineage: names the data set.
        cohorts: those that would pay, and what the site published of the size of each; none where only the job itself
            says how large the site is.
        coordinator: who would seal the job, where that is known.
    """

    policy: Policy | None = None
    proof: SiteProof | None = None
    lineage: str = ""
    cohorts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    coordinator: PublicKey | None = None

    @classmethod
    def of_ledger(cls, proof: SiteProof | None, *, policy: Policy | None) -> "Standing":
        """A site of which no more is at hand than its ledger: the cohorts that it charged last would pay."""
        charged = list(proof.charges.values())[-1].reserve.accounts if proof and proof.charges else ()
        if proof is None or not charged:
            return cls(policy=policy, proof=proof)
        return cls(
            policy=policy,
            proof=proof,
            lineage=charged[0].lineage,
            cohorts={account.cohort: proof.accounts[account].dataset.declared_items for account in charged},
        )

    @property
    def declared_items(self) -> int | None:
        """What the site published of its size; None where only the job itself says so."""
        return sum(self.cohorts.values()) if self.cohorts else None

    def dataset(self, account: AccountKey) -> DatasetOpened | None:
        """The terms on record under which either side of the account's cohort stands."""
        known = self.proof.accounts if self.proof else {}
        sides = (replace(account, partition=partition) for partition in _PARTITIONS)
        return next((known[side].dataset for side in sides if side in known), None)


@dataclass(frozen=True, kw_only=True)
class AccountForecast:
    """Epsilon at ``delta`` of one side of a site's items: ``before`` the job, of the job ``alone``, ``after`` both.

    ``ceiling`` is the partner's lifetime limit on it, None where neither policy nor ledger is at hand. An epsilon that
    the account cannot express (Poisson steps on one that admits integer noise alone) is infinite.
    """

    account: AccountKey
    spending: Spending
    composition: Composition
    delta: Fraction
    ceiling: Fraction | None
    before: float
    alone: float
    after: float

    @property
    def left(self) -> float | None:
        """What the ceiling leaves after the job; 0 if the job would pass it."""
        return None if self.ceiling is None else max(0.0, float(self.ceiling) - self.after)


@dataclass(frozen=True, kw_only=True)
class SiteForecast:
    """What the job means for one site.

    Attributes:
        site: whose forecast this is.
        training, held_out: one account a cohort, in the cohorts' order.
        observers: of an item in a cohort that takes part.
        exhausted: the errors of accounts that could not bear the job; their cohorts stay out.
        refusals: the errors that the site would answer with; none: it takes part.
        reservations: what its policy asks for besides: a person, an hour, not to be measured on.
    """

    site: SiteId
    training: tuple[AccountForecast, ...]
    held_out: tuple[AccountForecast, ...]
    observers: ObserverEpsilons
    exhausted: tuple[str, ...]
    refusals: tuple[str, ...]
    reservations: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class JobForecast:
    """The job, every participant's forecast in order, and who would take part."""

    job: TrainingJob
    sites: tuple[SiteForecast, ...]

    @property
    def willing(self) -> tuple[SiteId, ...]:
        """The sites that nothing known here would make refuse."""
        return tuple(site.site for site in self.sites if not site.refusals)

    @property
    def runs(self) -> bool:
        """Whether as many sites would take part as ``aggregation.minimum_sites`` asks for."""
        return len(self.willing) >= self.job.spec.aggregation.minimum_sites


@dataclass(frozen=True, kw_only=True)
class MetricsForecast:
    """How far the evaluation's noise moves the metrics of one table of counts.

    ``exact`` are the table's own metrics, never released; ``mean`` and ``deviation`` those of what would be. They
    differ also in the mean, because counts below zero are clamped. ``cell_deviation`` is the noise of one count, items.
    """

    sites: int
    cell_deviation: float
    exact: GradingMetrics
    mean: GradingMetrics
    deviation: GradingMetrics


def forecast(job: TrainingJob, *, standings: Mapping[SiteId, Standing]) -> JobForecast:
    """What ``job`` would cost each of its participants if every round ran once.

    A site without an entry in ``standings`` is forecast from the job alone. Observers who see only models face the
    noise of the sites that would take part.
    """
    asked = {site: standings.get(site, Standing()) for site in job.participants}
    sides = {site: _accounts(job, site, standing) for site, standing in asked.items()}
    exhausted = {site: _exhausted(job, accounts) for site, accounts in sides.items()}
    refusals = {site: _refusals(job, site, asked[site], sides[site], exhausted[site]) for site in asked}
    noisy = sum(not refused for refused in refusals.values())
    shared = observer_epsilons(job.plan, participants=noisy or len(asked))
    return JobForecast(
        job=job,
        sites=tuple(
            SiteForecast(
                site=site,
                training=accounts["train"],
                held_out=accounts["test"],
                observers=_observers(shared, own=max(one.alone for one in accounts["train"]), plan=job.plan),
                exhausted=tuple(exhausted[site].values()),
                refusals=refusals[site],
                reservations=_reservations(asked[site].policy),
            )
            for site, accounts in sides.items()
        ),
    )


def training_path(account: AccountForecast, job: TrainingJob) -> tuple[tuple[int, float], ...]:
    """Epsilon of a training account after so many of ``job``'s releases, from none to all; long jobs are sampled."""
    releases = job.plan.rounds + 1
    points = _POISSON_POINTS if job.plan.mode == "local_sgd" else _GAUSSIAN_POINTS
    kept = {0, 1, releases, *(round(releases * step / points) for step in range(points + 1))}
    spending, path = account.spending, []
    for done in range(releases + 1):
        if done:
            spending = spending.charged(job.plan.centre if done == 1 else job.plan.train, job=job.digest)
        if done in kept:
            path.append((done, _epsilon(spending, delta=account.delta, composition=account.composition)))
    return tuple(path)


def metrics_forecast(
    table: ConfusionCounts, plan: PrivacyPlan, *, sites: int, scale: GradeScale, rng: np.random.Generator
) -> MetricsForecast:
    """The metrics of ``table`` with the noise of ``sites`` sites' evaluations, drawn 1,000 times through the real code.

    A sum of the sites' discrete Gaussians, some hundreds of grid units wide each, is drawn as a rounded normal, from
    which nothing could tell it. ``rng`` makes up a forecast, never a release.
    """
    deviation = plan.evaluate.scale * math.sqrt(sites)
    grades = len(table.counts)
    noise = np.rint(rng.normal(scale=deviation, size=(_DRAWS, grades, grades))).astype(np.int64)
    drawn = [
        vars(metrics(ConfusionCounts.of(table.table + from_grid(one, max_norm=1.0, mechanism=plan.evaluate)), scale))
        for one in noise
    ]
    columns = {name: np.array([one[name] for one in drawn]) for name in drawn[0]}
    return MetricsForecast(
        sites=sites,
        cell_deviation=deviation / plan.evaluate.sensitivity,
        exact=metrics(table, scale),
        mean=GradingMetrics(**{name: float(column.mean()) for name, column in columns.items()}),
        deviation=GradingMetrics(**{name: float(column.std()) for name, column in columns.items()}),
    )


def held_out_items(job: TrainingJob) -> float:
    """About how many held-out items the participants have: sites declare their training items alone."""
    fraction = job.spec.data.test_fraction
    return sum(job.declared_items.values()) * fraction / (1 - fraction)


def plausible_counts(scale: GradeScale, *, items: float) -> ConfusionCounts:
    """A made-up table of ``items``: all grades equally frequent, each step further from the truth four times rarer."""
    grades = np.arange(scale.grades)
    weights = _FALL_OFF ** -np.abs(grades[:, None] - grades[None, :]).astype(np.float64)
    return ConfusionCounts.of(weights / weights.sum(axis=1, keepdims=True) * items / scale.grades)


def latest_counts(proof: FederationProof, *, scale: GradeScale) -> tuple[str, ConfusionCounts] | None:
    """The name of the job that last published counts on ``scale``, and those counts, clamped; None if none has."""
    releases = [job.release.release for job in proof.jobs.values() if job.release is not None]
    alike = [one for one in releases if one.job.spec.grading == scale and np.maximum(one.counts.table, 0).any()]
    if not alike:
        return None
    last = max(alike, key=lambda one: one.published)
    return last.job.spec.name, ConfusionCounts.of(np.maximum(last.counts.table, 0.0))


def strongest_attacks(forecasted: JobForecast) -> dict[str, tuple[float, Fraction, AttackBound]]:
    """Per observer: the largest epsilon over sites, the delta it holds at, and the strongest attack that leaves."""
    plan = forecasted.job.plan
    bound_of = bound_from_epsilon if plan.mode == "local_sgd" else bound_from_zcdp_epsilon
    attacks = {}
    for name in ("model_holder", "other_partner", "coordinator", "full_collusion"):
        worst = max(forecasted.sites, key=lambda site: float(getattr(site.observers, name)))
        epsilon = float(getattr(worst.observers, name))
        delta = worst.training[0].delta if _faces_own_noise(name, plan) else plan.delta
        attacks[name] = (epsilon, delta, bound_of(epsilon, delta=delta))
    return attacks


def _faces_own_noise(observer: str, plan: PrivacyPlan) -> bool:
    """Whether only a site's own noise stands between this observer and its items."""
    if plan.mode == "local_sgd" or observer == "full_collusion":
        return True
    return observer == "coordinator" and plan.mode == "local"


def _observers(shared: ObserverEpsilons, *, own: float, plan: PrivacyPlan) -> ObserverEpsilons:
    """``shared`` with a site's own noise measured by its own account, as the verifier will measure it."""
    faced = {name: own for name in vars(shared) if _faces_own_noise(name, plan)}
    return replace(shared, **faced)


def _accounts(job: TrainingJob, site: SiteId, standing: Standing) -> dict[Partition, tuple[AccountForecast, ...]]:
    cohorts = sorted(standing.cohorts) or [""]
    return {
        partition: tuple(
            _account_forecast(
                job,
                standing,
                AccountKey(partner=site, lineage=standing.lineage, cohort=cohort, partition=partition),
            )
            for cohort in cohorts
        )
        for partition in _PARTITIONS
    }


def _account_forecast(job: TrainingJob, standing: Standing, account: AccountKey) -> AccountForecast:
    known = standing.proof.accounts.get(account) if standing.proof else None
    spending = known.spending if known else Spending()
    ceiling = _ceiling(standing, standing.dataset(account))
    delta = ceiling.delta if ceiling else job.plan.delta
    composition = ceiling.composition if ceiling else job.plan.composition
    charge = _charge(job, account)
    return AccountForecast(
        account=account,
        spending=spending,
        composition=composition,
        delta=delta,
        ceiling=ceiling.epsilon if ceiling else None,
        before=_epsilon(spending, delta=delta, composition=composition),
        alone=_epsilon(charge(Spending(), job=job.digest), delta=delta, composition=composition),
        after=_epsilon(charge(spending, job=job.digest), delta=delta, composition=composition),
    )


def _charge(job: TrainingJob, account: AccountKey) -> Callable[..., Spending]:
    """What the whole of ``job`` adds to ``account``."""
    return job.plan.charge_training if account.partition == "train" else job.plan.charge_evaluation


def _ceiling(standing: Standing, dataset: DatasetOpened | None) -> Ceiling | None:
    """The partner's policy file rules; where only its ledger is at hand, the ceiling on record does."""
    if standing.policy is not None:
        return standing.policy.ceiling
    if dataset is not None:
        return Ceiling(epsilon=dataset.epsilon_limit, delta=dataset.delta, composition=dataset.composition)
    return None


def _epsilon(spending: Spending, *, delta: Fraction, composition: Composition) -> float:
    try:
        return spending.epsilon(delta=delta, composition=composition)
    except FedgradeError:  # the refusals say why
        return math.inf


def _exhausted(job: TrainingJob, sides: Mapping[Partition, tuple[AccountForecast, ...]]) -> dict[AccountKey, str]:
    """The accounts that could not bear ``job``, each with its error."""
    rules = {
        account.account: partial(_require_affordable, job, account)
        for accounts in sides.values()
        for account in accounts
        if account.ceiling is not None
    }
    return {account: message for account, rule in rules.items() if (message := _refusal(rule)) is not None}


def _refusals(
    job: TrainingJob,
    site: SiteId,
    standing: Standing,
    sides: Mapping[Partition, tuple[AccountForecast, ...]],
    exhausted: Mapping[AccountKey, str],
) -> tuple[str, ...]:
    """What the site would say no with, each rule's own words; the policy names the first rule that is broken."""
    policy, declared = standing.policy, standing.declared_items
    rules: list[Callable[[], object]] = []
    if policy is not None:
        published = job.declared_items[site] if declared is None else declared
        rules.append(partial(admit, job, policy=policy, site=site, declared_items=published))
        if standing.coordinator is not None:
            rules.append(partial(require_coordinator, policy, standing.coordinator))
        for account in sides["train"]:
            if dataset := standing.dataset(account.account):
                items = standing.cohorts.get(account.account.cohort, dataset.declared_items)
                terms = replace(dataset, composition=policy.composition, declared_items=items)
                rules.append(partial(require_same_terms, terms, standing=dataset))
    rules += [partial(_require_company, job, standing, side, exhausted) for side in sides.values()]
    # A site stays out only if on one side no cohort can pay; otherwise the others go on.
    broke = [side for side in sides.values() if all(one.account in exhausted for one in side)]
    messages = [message for rule in rules if (message := _refusal(rule)) is not None]
    messages += [exhausted[side[0].account] for side in broke]
    return tuple(dict.fromkeys(messages))


def _reservations(policy: Policy | None) -> tuple[str, ...]:
    """What ``policy`` asks for that is no refusal."""
    asked = {} if policy is None else {
        "a person must approve the job first (policy.approval)": policy.approval,
        f"answers at {policy.hours} alone, by its own clock (policy.hours)": policy.hours,
        "trains, and is not measured on (policy.releases)": "evaluate" not in policy.releases,
    }  # fmt: skip
    return tuple(words for words, applies in asked.items() if applies)


def _require_company(
    job: TrainingJob, standing: Standing, side: tuple[AccountForecast, ...], exhausted: Mapping[AccountKey, str]
) -> None:
    """Ask for enough items in the cohorts that can pay, where some can and some cannot."""
    paying = [one.account.cohort for one in side if one.account not in exhausted]
    if 0 < len(paying) < len(side):
        items = sum(standing.cohorts[cohort] for cohort in paying)
        require_company(job, items=items, policy_minimum=standing.policy.minimum_items if standing.policy else 0)


def _require_affordable(job: TrainingJob, account: AccountForecast) -> None:
    ceiling = Ceiling(epsilon=account.ceiling or Fraction(0), delta=account.delta, composition=account.composition)
    after = _charge(job, account.account)(account.spending, job=job.digest)
    require_affordable(after, ceiling=ceiling, account=account.account)


def _refusal(rule: Callable[[], object]) -> str | None:
    try:
        rule()
    except FedgradeError as error:
        return str(error)
    return None
