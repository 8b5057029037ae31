"""The whole privacy plan of a job, solved before it starts. The plan that trains is the plan that charges.

``calibrate(spec, participants)`` turns what is wished for (an epsilon for the whole job) into exact mechanisms, one
for each kind of release. The plan is sealed into the job; sites compare it with their own policy and never take a
number from anywhere else.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from fedgrade.errors import JobRefused, PlanRefused
from fedgrade.privacy.accounting import confirmed_epsilon, poisson_noise_multiplier, zcdp_epsilon, zcdp_rho
from fedgrade.privacy.budget import Spending
from fedgrade.privacy.grid import MAX_SCALE
from fedgrade.trust.records import Composition, DiscreteGaussian, Mechanism, PoissonGaussian, Purpose

# Of a unit vector's mean, of gradients (inputs and residuals have 20 each), and of counts.
CENTRE_GRID_BITS, TRAIN_GRID_BITS, COUNT_GRID_BITS = 20, 40, 10
MIN_PARTICIPANTS = 2
# Clips that arithmetic cannot tell from nothing or from everything would be measured against noise that is neither.
MIN_GRAD_NORM, MAX_GRAD_NORM = 1e-6, 1e6
_MAX_ROUNDS = 10_000
_MAX_STEPS = 20_000  # accountants take longer with every step, and a job is solved by whoever reads it
_SGD_DELTA_SHARE = 4  # the first Poisson job of a mixed account has delta / 4


@dataclass(frozen=True, kw_only=True)
class LocalSpec:
    """Full batch, exact integer noise in full at each site: every upload is itself private."""

    mode: Literal["local"] = "local"
    target_epsilon: float
    delta: float
    evaluation_epsilon: float
    centre_share: float
    rounds: int
    max_grad_norm: float

    def __post_init__(self) -> None:
        _check_common(self)


@dataclass(frozen=True, kw_only=True)
class DistributedSpec:
    """Full batch, each site adds a share of exact integer noise; only the secure sum is ever seen.

    ``floor_epsilon`` bounds what anyone learns who breaks the secure sum, or colludes with every other site.
    """

    mode: Literal["distributed"] = "distributed"
    target_epsilon: float
    floor_epsilon: float
    delta: float
    evaluation_epsilon: float
    centre_share: float
    rounds: int
    max_grad_norm: float

    def __post_init__(self) -> None:
        _check_common(self)
        if not self.target_epsilon <= self.floor_epsilon < math.inf:
            raise JobRefused(
                f"privacy.floor_epsilon: {self.floor_epsilon} must be at least target_epsilon ({self.target_epsilon}) "
                "and finite"
            )


@dataclass(frozen=True, kw_only=True)
class LocalSgdSpec:
    """DP-SGD at each site: Poisson batches, several steps a round, then a mean of the updates (Opacus)."""

    mode: Literal["local_sgd"] = "local_sgd"
    target_epsilon: float
    delta: float
    evaluation_epsilon: float
    centre_share: float
    rounds: int
    max_grad_norm: float
    sampling_rate: float
    local_steps: int
    learning_rate: float

    def __post_init__(self) -> None:
        _check_common(self)
        if not 0 < self.sampling_rate <= 1:
            raise JobRefused(f"privacy.sampling_rate: {self.sampling_rate} must be in (0, 1]")
        if not 1 <= self.local_steps <= _MAX_ROUNDS:
            raise JobRefused(f"privacy.local_steps: {self.local_steps} must be in 1..{_MAX_ROUNDS}")
        if self.local_steps * self.rounds > _MAX_STEPS:
            raise JobRefused(
                f"privacy.local_steps: {self.local_steps} in each of {self.rounds} rounds; at most {_MAX_STEPS} steps "
                "in all"
            )
        if not 0 < self.learning_rate < math.inf:
            raise JobRefused(f"privacy.learning_rate: {self.learning_rate} must be above 0")


PrivacySpec = Annotated[LocalSpec | DistributedSpec | LocalSgdSpec, Field(discriminator="mode")]


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Exactly what each site releases: one ``centre``, ``rounds`` times ``train``, one ``evaluate``.

    Grid-based mechanisms are in units of the integer grid: a site's clipped sum is scaled by 2^``grid_bits`` /
    ``max_grad_norm``, so that one item moves it by at most ``sensitivity`` in L2 norm.
    """

    mode: Literal["local", "distributed", "local_sgd"]
    target_epsilon: Fraction
    delta: Fraction
    rounds: int
    max_grad_norm: float
    centre: DiscreteGaussian
    train: Mechanism
    evaluate: DiscreteGaussian

    def __post_init__(self) -> None:
        if (self.mode == "local_sgd") != isinstance(self.train, PoissonGaussian):
            raise PlanRefused(f"plan: mode {self.mode} does not go with a {self.train.kind} training mechanism")
        _check_grid("centre", self.centre, bits=CENTRE_GRID_BITS)
        _check_grid("evaluate", self.evaluate, bits=COUNT_GRID_BITS)
        if isinstance(self.train, DiscreteGaussian):
            _check_grid("train", self.train, bits=TRAIN_GRID_BITS)
        if not 1 <= self.rounds <= _MAX_ROUNDS or not MIN_GRAD_NORM <= self.max_grad_norm <= MAX_GRAD_NORM:
            raise PlanRefused(
                f"plan: rounds {self.rounds} must be in 1..{_MAX_ROUNDS} and max_grad_norm {self.max_grad_norm} in "
                f"[{MIN_GRAD_NORM:g}, {MAX_GRAD_NORM:g}]"
            )
        if isinstance(self.train, PoissonGaussian) and self.train.planned_steps != self.train.steps * self.rounds:
            raise PlanRefused(
                f"plan: planned_steps {self.train.planned_steps} are not {self.train.steps} in each of {self.rounds} "
                "rounds"
            )

    def mechanism(self, purpose: Purpose) -> Mechanism:
        """What one release for ``purpose`` costs."""
        return {"centre": self.centre, "train": self.train, "evaluate": self.evaluate}[purpose]

    @property
    def composition(self) -> Composition:
        """What kind of account this plan needs."""
        return "mixed" if self.mode == "local_sgd" else "zcdp"

    def charge_training(self, spending: Spending, *, job: str) -> Spending:
        """``spending`` of a training account after the whole job, if every round runs once.

        Poisson steps are paid for with the first round, and cost no less if later ones never run.
        """
        spending = spending.charged(self.centre, job=job)
        for _ in range(self.rounds):
            spending = spending.charged(self.train, job=job)
        return spending

    def charge_evaluation(self, spending: Spending, *, job: str) -> Spending:
        """``spending`` of a held-out account after the whole job."""
        return spending.charged(self.evaluate, job=job)


@dataclass(frozen=True, kw_only=True)
class ObserverEpsilons:
    """What each observer can learn about one item of one site, as epsilon at the plan's delta."""

    coordinator: float
    other_partner: float
    model_holder: float
    full_collusion: float


def calibrate(spec: PrivacySpec, *, participants: int) -> PrivacyPlan:
    """The plan whose releases together cost each item at most ``spec.target_epsilon`` at ``spec.delta``.

    Raises:
        PlanRefused: no noise is enough, there are too few participants for the mode, or two accountants disagree.
    """
    if participants < MIN_PARTICIPANTS:
        raise PlanRefused(f"privacy: {participants} participants; federated training takes {MIN_PARTICIPANTS} or more")
    plan = _solved(spec, participants=participants)
    _require_agreement(plan)
    return plan


def observer_epsilons(plan: PrivacyPlan, *, participants: int) -> ObserverEpsilons:
    """Epsilon per observer if every round runs once; derivation in docs/threat-model.md.

    Whoever sees a site's own upload faces that site's noise alone. Whoever sees only the models faces the sum of all
    sites' noise, less what it added itself: with equal scales rho divides by the number of shares it cannot remove.
    For ``local_sgd`` no such reduction is claimed, because a site's update is not a sum with independent noise of the
    others until after local steps.
    """
    spending = plan.charge_training(Spending(), job="plan")
    own = spending.epsilon(delta=plan.delta, composition=plan.composition)
    if plan.mode == "local_sgd":
        return ObserverEpsilons(coordinator=own, other_partner=own, model_holder=own, full_collusion=own)
    partner = zcdp_epsilon(spending.rho / max(1, participants - 1), delta=plan.delta)
    holder = zcdp_epsilon(spending.rho / participants, delta=plan.delta)
    coordinator = holder if plan.mode == "distributed" else own
    return ObserverEpsilons(coordinator=coordinator, other_partner=partner, model_holder=holder, full_collusion=own)


def exact(number: float) -> Fraction:
    """The fraction that ``number`` spells in decimal: 0.1 is 1/10, as the person who wrote it meant."""
    return Fraction(repr(number))


def _solved(spec: PrivacySpec, *, participants: int) -> PrivacyPlan:
    match spec:
        case LocalSpec():
            rho = zcdp_rho(exact(spec.target_epsilon), delta=exact(spec.delta))
            return _full_batch_plan(spec, rho, mode="local")
        case DistributedSpec():
            return _distributed_plan(spec, participants=participants)
        case LocalSgdSpec():
            return _sgd_plan(spec)


def _require_agreement(plan: PrivacyPlan) -> None:
    """Return if a second accountant confirms what the plan's integer noise costs each side of a site's items.

    Poisson steps need none here: no epsilon of theirs is ever computed without one.
    """
    # A mixed account turns rho into epsilon with half of its delta.
    delta = plan.delta / 2 if plan.composition == "mixed" else plan.delta
    training = plan.charge_training(Spending(), job="plan").rho
    for rho in (training, plan.evaluate.rho):
        confirmed_epsilon(rho, delta=delta)


def _full_batch_plan(
    spec: LocalSpec | DistributedSpec, rho: Fraction, *, mode: Literal["local", "distributed"]
) -> PrivacyPlan:
    """The plan by which each site's own noise costs at most ``rho`` for centring and all rounds together."""
    delta, share = exact(spec.delta), exact(spec.centre_share)
    return PrivacyPlan(
        mode=mode,
        target_epsilon=exact(spec.target_epsilon),
        delta=delta,
        rounds=spec.rounds,
        max_grad_norm=spec.max_grad_norm,
        centre=_gaussian(rho * share, bits=CENTRE_GRID_BITS),
        train=_gaussian(rho * (1 - share) / spec.rounds, bits=TRAIN_GRID_BITS),
        evaluate=_gaussian(zcdp_rho(exact(spec.evaluation_epsilon), delta=delta), bits=COUNT_GRID_BITS),
    )


def _distributed_plan(spec: DistributedSpec, *, participants: int) -> PrivacyPlan:
    """Each site's scale is the larger of its share of the aggregate's noise and its floor under full collusion."""
    delta = exact(spec.delta)
    aggregate = zcdp_rho(exact(spec.target_epsilon), delta=delta)
    # The aggregate's rho is a site's own divided by the number of shares; a partner removes one of them.
    by_share = aggregate * (participants - 1)
    by_floor = zcdp_rho(exact(spec.floor_epsilon), delta=delta)
    return _full_batch_plan(spec, min(by_share, by_floor), mode="distributed")


def _sgd_plan(spec: LocalSgdSpec) -> PrivacyPlan:
    delta, target, rate = exact(spec.delta), exact(spec.target_epsilon), exact(spec.sampling_rate)
    centre_epsilon = target * exact(spec.centre_share)
    centre = _gaussian(zcdp_rho(centre_epsilon, delta=delta / 2), bits=CENTRE_GRID_BITS)
    planned = spec.local_steps * spec.rounds
    noise = poisson_noise_multiplier(
        sampling_rate=rate,
        steps=planned,
        epsilon=target - centre_epsilon,
        delta=delta / _SGD_DELTA_SHARE,
    )
    return PrivacyPlan(
        mode="local_sgd",
        target_epsilon=target,
        delta=delta,
        rounds=spec.rounds,
        max_grad_norm=spec.max_grad_norm,
        centre=centre,
        train=PoissonGaussian(
            sampling_rate=rate, noise_multiplier=noise, steps=spec.local_steps, planned_steps=planned
        ),
        evaluate=_gaussian(zcdp_rho(exact(spec.evaluation_epsilon), delta=delta / 2), bits=COUNT_GRID_BITS),
    )


def _gaussian(rho: Fraction, *, bits: int) -> DiscreteGaussian:
    """A least integer noise scale on the grid of 2^``bits`` that costs at most ``rho``.

    On a finer grid than 2^20 the scale is a multiple of what makes it one: a plan is solved anew by whoever reads it,
    and should not hang on the last bits of another machine's logarithms.
    """
    sensitivity, step = 2**bits, 2 ** max(0, bits - CENTRE_GRID_BITS)
    wanted = Fraction(sensitivity**2) / (2 * rho)  # the least square of a scale
    scale = math.isqrt(wanted.numerator // wanted.denominator)
    scale += scale**2 < wanted
    return DiscreteGaussian(sensitivity=sensitivity, scale=-(-scale // step) * step)


def _check_grid(name: str, mechanism: DiscreteGaussian, *, bits: int) -> None:
    if mechanism.sensitivity != 2**bits:
        raise PlanRefused(f"plan: {name} sensitivity {mechanism.sensitivity} is not the grid's 2^{bits}")
    if mechanism.scale > MAX_SCALE:
        raise PlanRefused(
            f"plan: {name} noise would be {mechanism.scale // mechanism.sensitivity:,} times what one item can do; at "
            f"most {MAX_SCALE // mechanism.sensitivity:,} times; allow a larger epsilon, or fewer rounds"
        )


def _check_common(spec: LocalSpec | DistributedSpec | LocalSgdSpec) -> None:
    for name in ("target_epsilon", "evaluation_epsilon"):
        value = getattr(spec, name)
        if not 0 < value < math.inf:
            raise JobRefused(f"privacy.{name}: {value} must be above 0")
    if not MIN_GRAD_NORM <= spec.max_grad_norm <= MAX_GRAD_NORM:
        raise JobRefused(
            f"privacy.max_grad_norm: {spec.max_grad_norm} must be in [{MIN_GRAD_NORM:g}, {MAX_GRAD_NORM:g}]"
        )
    if not 0 < spec.delta < 1:
        raise JobRefused(f"privacy.delta: {spec.delta} must be above 0 and below 1")
    if not 0 < spec.centre_share < 1:
        raise JobRefused(f"privacy.centre_share: {spec.centre_share} must be above 0 and below 1")
    if not 1 <= spec.rounds <= _MAX_ROUNDS:
        raise JobRefused(f"privacy.rounds: {spec.rounds} must be in 1..{_MAX_ROUNDS}")
