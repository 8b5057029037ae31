"""From mechanisms to epsilon, and back. The one file that knows dp-accounting.

Integer noise is accounted in zero-concentrated differential privacy, exactly, as fractions of rho; dp-accounting's
privacy loss distribution must confirm it. Poisson-sampled noise is accounted by that distribution, pessimistically;
an attack in closed form must bound it from below, and dp-accounting's Rényi accountant, held against the closed form of
the same divergences, from above.
Adjacency: add or remove one item. Everything printed is rounded up.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from functools import cache

import numpy as np
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from fedgrade.errors import PlanRefused
from fedgrade.privacy.bounds import least_epsilon, renyi_epsilon

MIN_DELTA = Fraction(1, 10**9)
_LARGE_RHO = 1000
_HUGE_RHO = 2**64  # beyond this epsilon is called infinite; hostile ledgers may hold any fraction
# Floating-point arithmetic may lose this part of each term of a sum; it is added back, so that no bound is understated.
_ROUNDING = 2.0**-46
_PLD_INTERVAL = 1e-4
_GATE_SLACK = 1e-3
# How far zCDP may exceed the privacy loss distribution, which for one Gaussian is exact to five digits: as measured
# over rho in [1e-6, 1e3] and delta in [1e-9, 0.5], and a little more. Beyond it, one of the two is wrong.
_ZCDP_EXCESS, _ZCDP_EXCESS_AT_ZERO, _ZCDP_EXCESS_PER_DELTA = 1.2, 0.05, 5.0
# Whole orders converge everywhere; the fractional ones that dp-accounting adds by default do not, and log about it.
_RENYI_ORDERS = (*range(2, 64), 128, 256, 512, 1024)
_NOISE_STEP = Fraction(1, 2**9)  # noise multipliers are whole multiples of it

_Events = tuple[tuple[Fraction, Fraction, int], ...]


def zcdp_epsilon(rho: Fraction, *, delta: Fraction) -> float:
    """The epsilon at ``delta`` of a mechanism that is ``rho``-zCDP, never below the truth.

    Minimises the conversion of Canonne, Kamath and Steinke (2020), Proposition 12, https://arxiv.org/abs/2004.00010:
    epsilon = alpha rho + log(1/(alpha delta))/(alpha - 1) + log(1 - 1/alpha) over alpha > 1. Any alpha gives a valid
    bound, so an imperfect minimiser can only overstate.

    Raises:
        PlanRefused: ``rho`` is negative or ``delta`` outside [1e-9, 1).
    """
    _check_delta(delta)
    if rho < 0:
        raise PlanRefused(f"rho {rho} is negative; a mechanism cannot give privacy back")
    if rho == 0:
        return 0.0
    if rho > _HUGE_RHO:
        return math.inf
    cost, log_delta = float(rho), math.log(float(delta))

    def bound(log_excess: float) -> float:
        excess = math.exp(log_excess)  # alpha - 1
        gain, loss = (1 + excess) * cost - log_delta / excess, math.log1p(excess) / excess + math.log1p(1 / excess)
        return gain - loss + (gain + loss) * _ROUNDING

    # Up to alpha = e^24, where every delta that is allowed exceeds 1/alpha: so small a rho costs nothing at all.
    best = minimize_scalar(bound, bounds=(-12.0, 24.0), method="bounded", options={"xatol": 1e-10})
    return max(0.0, float(best.fun))


def zcdp_rho(epsilon: Fraction, *, delta: Fraction) -> Fraction:
    """The largest rho, to one part in 2^40, whose :func:`zcdp_epsilon` at ``delta`` does not exceed ``epsilon``.

    Raises:
        PlanRefused: ``epsilon`` is not positive or absurdly large.
    """
    low, high = Fraction(0), Fraction(_LARGE_RHO)
    if epsilon <= 0 or zcdp_epsilon(high, delta=delta) < epsilon:
        raise PlanRefused(f"epsilon {float(epsilon):g} must be above 0 and below {_LARGE_RHO}")
    while high - low > high / 2**40:
        middle = (low + high) / 2
        low, high = (middle, high) if zcdp_epsilon(middle, delta=delta) <= epsilon else (low, middle)
    return low


@cache
def confirmed_epsilon(rho: Fraction, *, delta: Fraction) -> float:
    """The :func:`zcdp_epsilon` of integer noise that costs ``rho``, confirmed by a second accountant.

    The second is dp-accounting's privacy loss distribution of the continuous Gaussian of the same rho, into which any
    number of Gaussian releases compose. It may not exceed the first, nor may the first exceed 1.2 times it plus 0.05
    (plus 5 delta, which matters to sites of a few items only).

    Raises:
        PlanRefused: the two disagree, so neither is believed.
    """
    claimed = zcdp_epsilon(rho, delta=delta)
    if rho == 0:
        return claimed
    # An error of at most one interval, which need not be finer than the number it is an error of.
    interval = max(_PLD_INTERVAL, claimed * _PLD_INTERVAL)
    loss = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
    loss.compose(GaussianDpEvent(1 / math.sqrt(2 * float(rho))))
    # dp-accounting divides by masses that may be tiny; infinity is then the right answer, and no news.
    with np.errstate(over="ignore"):
        second = float(loss.get_epsilon(float(delta)))
    most = second * _ZCDP_EXCESS + _ZCDP_EXCESS_AT_ZERO + float(delta) * _ZCDP_EXCESS_PER_DELTA
    if not second - _GATE_SLACK <= claimed <= most:
        raise PlanRefused(
            f"accountants disagree: zCDP gives epsilon {claimed:.4f}, privacy loss distribution {second:.4f}; the job "
            "is refused until they agree"
        )
    return claimed


def poisson_epsilon(events: Mapping[tuple[Fraction, Fraction], int], *, delta: Fraction) -> float:
    """The epsilon at ``delta`` of composed Poisson-sampled Gaussian steps, never below the truth.

    Args:
        events: how many steps were taken at each (sampling rate, noise multiplier).
        delta: at least 1e-9.

    Raises:
        PlanRefused: the accountants disagree, so none is believed.
    """
    _check_delta(delta)
    if not any(events.values()):
        return 0.0
    key = tuple(sorted((rate, noise, steps) for (rate, noise), steps in events.items() if steps))
    return _poisson_epsilon(key, delta)


def poisson_noise_multiplier(*, sampling_rate: Fraction, steps: int, epsilon: Fraction, delta: Fraction) -> Fraction:
    """The least noise multiplier, to 2^-9, at which ``steps`` Poisson steps cost at most ``epsilon``.

    The Rényi bound, which takes milliseconds, says where to look; the privacy loss distribution decides.

    Raises:
        PlanRefused: no multiplier below 2^12 is enough.
    """

    def suffices(multiple: int) -> bool:
        return poisson_epsilon({(sampling_rate, multiple * _NOISE_STEP): steps}, delta=delta) <= epsilon

    def surely_suffices(multiple: int) -> bool:
        return _renyi_epsilon(((sampling_rate, multiple * _NOISE_STEP, steps),), delta) <= epsilon

    highest = int(2**12 / _NOISE_STEP)
    if not surely_suffices(highest):
        raise PlanRefused(f"epsilon {float(epsilon):g} over {steps} steps needs noise beyond any use; take fewer steps")
    high = _least(surely_suffices, low=0, high=highest)
    while not suffices(high):  # the distribution is discretised upwards, and may exceed the bound by a hair
        high += 1
    # The bound overstates the noise by some hundredths: step down until it no longer suffices.
    low = high - high // 16 - 1
    while low > 0 and suffices(low):
        low, high = low - low // 16 - 1, low
    return _least(suffices, low=low, high=high) * _NOISE_STEP


def gaussian_delta(epsilon: float, *, rho: Fraction) -> float:
    """The exact delta at ``epsilon`` of a continuous Gaussian mechanism of cost ``rho``: the oracle for tests.

    Balle and Wang (2018), https://arxiv.org/abs/1805.06530, Theorem 8, with sensitivity/sigma = sqrt(2 rho).
    """
    ratio = math.sqrt(2 * float(rho))
    return float(norm.cdf(ratio / 2 - epsilon / ratio) - math.exp(epsilon) * norm.cdf(-ratio / 2 - epsilon / ratio))


def strongest_attack(epsilon: float, *, delta: Fraction, false_positive_rate: float = 0.01) -> float:
    """The most true positives any membership attack can have at ``false_positive_rate`` under (epsilon, delta).

    Kairouz, Oh and Viswanath (2015), https://arxiv.org/abs/1311.0776: TPR <= exp(epsilon) FPR + delta, and
    1 - FPR <= exp(epsilon) (1 - TPR) + delta from the other side.
    """
    tail = float(delta)
    upper = math.exp(min(epsilon, 700.0)) * false_positive_rate + tail
    other = 1 - math.exp(-epsilon) * (1 - tail - false_positive_rate)
    return min(1.0, upper, other)


def printed(epsilon: float) -> str:
    """``epsilon`` with two decimals, rounded up: what reports and terminals show."""
    if not math.isfinite(epsilon):
        return str(epsilon)
    # In decimal, as the number is written: in binary 1.1 is a little above 1.1, and would be shown as 1.11.
    return str(Decimal(repr(epsilon)).quantize(Decimal("0.01"), rounding=ROUND_CEILING))


def _least(suffices: Callable[[int], bool], *, low: int, high: int) -> int:
    """The least number above ``low`` that suffices, knowing that ``high`` does and ``low`` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


@cache
def _poisson_epsilon(events: _Events, delta: Fraction) -> float:
    loss = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=_PLD_INTERVAL)
    for event in _dp_events(events):
        loss.compose(event)
    epsilon, ceiling = float(loss.get_epsilon(float(delta))), _renyi_epsilon(events, delta)
    _require_between(epsilon, ceiling, events, float(delta))
    return epsilon


def _require_between(epsilon: float, ceiling: float, events: _Events, delta: float) -> None:
    """Return if no closed form contradicts what dp-accounting's two accountants say."""
    plain = tuple((float(rate), float(noise), steps) for rate, noise, steps in events)
    floor = least_epsilon(plain, delta=delta)
    by_hand = renyi_epsilon(plain, orders=_RENYI_ORDERS, delta=delta)
    within = floor - _GATE_SLACK <= epsilon <= ceiling + _GATE_SLACK
    # Both are the same finite sums; what differs is rounding.
    same = math.isclose(ceiling, by_hand, rel_tol=_GATE_SLACK, abs_tol=_GATE_SLACK)
    if not math.isfinite(epsilon) or not within or not same:
        raise PlanRefused(
            f"accountants disagree: privacy loss distribution gives {epsilon:.4f}; it must be at least {floor:.4f}, "
            f"which an attack reaches, and at most the Rényi bound, {ceiling:.4f} by dp-accounting and {by_hand:.4f} "
            "by hand; the job is refused until they agree"
        )


@cache
def _renyi_epsilon(events: _Events, delta: Fraction) -> float:
    renyi = RdpAccountant(_RENYI_ORDERS, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in _dp_events(events):
        renyi.compose(event)
    return float(renyi.get_epsilon(float(delta)))


def _dp_events(events: _Events) -> Iterator[SelfComposedDpEvent]:
    for rate, noise, steps in events:
        yield SelfComposedDpEvent(PoissonSampledDpEvent(float(rate), GaussianDpEvent(float(noise))), steps)


def _check_delta(delta: Fraction) -> None:
    if not MIN_DELTA <= delta < 1:
        raise PlanRefused(f"delta {float(delta):g} must be at least 1e-9 and below 1")
