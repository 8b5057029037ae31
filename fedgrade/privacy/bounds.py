"""Closed forms that hold a Poisson accountant from below and from above; nothing here knows dp-accounting.

One step releases N(0, sigma²) in units of the clip, and N(1, sigma²) with probability ``rate`` if the item is there.
From below: an event that can be computed exactly convicts any accountant whose (epsilon, delta) it breaks. From above:
Rényi divergences at whole orders are finite sums.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, logsumexp
from scipy.stats import binom, norm

Steps = tuple[float, float, int]  # sampling rate, noise multiplier, number of steps

_POINTS = 512  # thresholds that are tried, and blocks that a binomial is cut into
_REACH = 9.0  # standard deviations beyond which a tail is below any delta that is allowed
_LEVELS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def least_epsilon(events: Sequence[Steps], *, delta: float) -> float:
    """An epsilon that composed Poisson-sampled Gaussian steps exceed or meet at ``delta``, whatever an accountant says.

    An event of probability p with the item and r without it is against (epsilon, delta) unless p <= exp(epsilon) r +
    delta. Tried are: the sum of all outputs of one kind of steps is large, and many of its outputs are. The first is
    exact at rate 1, where the sum says all there is.
    """
    return max((bound for kind in events for bound in (_by_sum(kind, delta), _by_count(kind, delta))), default=0.0)


def renyi_epsilon(events: Sequence[Steps], *, orders: Sequence[int], delta: float) -> float:
    """The epsilon at ``delta`` by the best of ``orders``, all whole.

    Mironov, Talwar and Zhang (2019), https://arxiv.org/abs/1908.10530, section 3.3; turned into epsilon by Canonne,
    Kamath and Steinke (2020), https://arxiv.org/abs/2004.00010, Proposition 12, or by Bretagnolle and Huber's
    inequality, which says that so small a divergence is within ``delta`` by itself.
    """
    best = math.inf
    for order in orders:
        divergence = sum(steps * _log_moment(rate, noise, order) for rate, noise, steps in events) / (order - 1)
        if -math.expm1(-divergence) < delta**2:
            return 0.0
        best = min(best, divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return max(0.0, best)


def _by_sum(kind: Steps, delta: float) -> float:
    """With the item the sum is a normal shifted by a binomial number; large blocks of it count as their least."""
    rate, noise, steps = kind
    deviation = noise * math.sqrt(steps)
    spread = _REACH * math.sqrt(steps * rate * (1 - rate)) + _REACH
    edges = _whole(max(0, steps * rate - spread), min(steps, steps * rate + spread) + 1)
    masses = np.diff(binom.cdf(edges - 1, steps, rate))
    shifts = edges[:-1] / deviation
    thresholds = np.linspace(0.0, float(shifts[-1]) + _REACH, _POINTS)
    with_item = masses @ norm.sf(thresholds[None, :] - shifts[:, None])
    return _convicted(with_item, norm.logsf(thresholds), delta)


def _by_count(kind: Steps, delta: float) -> float:
    """How many of the steps exceed a level is binomial with the item and without it."""
    rate, noise, steps = kind
    counts, levels = _whole(0, steps)[None, :], np.array(_LEVELS)[:, None]
    without = norm.sf(levels / noise)
    with_item = (1 - rate) * without + rate * norm.sf((levels - 1) / noise)
    with np.errstate(divide="ignore"):  # a tail below the least float; not used
        log_without = binom.logsf(counts - 1, steps, without)
    return _convicted(binom.sf(counts - 1, steps, with_item), log_without, delta)


def _convicted(with_item: npt.NDArray[np.float64], log_without: npt.NDArray[np.float64], delta: float) -> float:
    """The largest epsilon at ``delta`` that one of these events refutes."""
    useful = (with_item > delta) & np.isfinite(log_without)
    return max(0.0, float(np.max(np.log(with_item[useful] - delta) - log_without[useful], initial=0.0)))


def _whole(low: float, high: float) -> npt.NDArray[np.float64]:
    """At most ``_POINTS`` whole numbers from ``low`` to ``high``, both among them up to rounding."""
    return np.unique(np.floor(np.linspace(math.floor(low), math.floor(high), _POINTS)))


def _log_moment(rate: float, noise: float, order: int) -> float:
    """Logarithm of E[(with / without)^order] of one step, by the binomial theorem."""
    if rate == 1:
        return order * (order - 1) / (2 * noise**2)
    drawn = np.arange(order + 1)
    ways = gammaln(order + 1) - gammaln(drawn + 1) - gammaln(order - drawn + 1)
    chances = (order - drawn) * math.log1p(-rate) + drawn * math.log(rate)
    return float(logsumexp(ways + chances + drawn * (drawn - 1) / (2 * noise**2)))
