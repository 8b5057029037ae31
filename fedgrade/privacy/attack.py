"""How well the strongest membership attack can do under a stated privacy loss.

Whatever the attacker knows already and however it computes, its true-positive rate at a given false-positive rate
cannot pass these bounds; they say nothing about attacks that anyone has tried.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt

from fedgrade.privacy.accounting import strongest_attack, zcdp_rho

FloatArray = npt.NDArray[np.float64]

FALSE_POSITIVE_RATE = 0.01

# Any set of orders gives a valid bound; more only tighten it.
_FINE = np.geomspace(1e-3, 1e3, 1001)  # alpha - 1
_COARSE = np.geomspace(1e-2, 1e2, 41)  # alpha - 1, for the whole curve
_GRID = np.linspace(0.0, 1.0, 1001)
_HALVINGS = 40
_LARGE_EPSILON = 500.0
_SMALL_EPSILON = 1e-6
# zcdp_rho answers from below, to 2^-40; the bound must not.
_RHO_MARGIN = Fraction(1, 2**38)


@dataclass(frozen=True, kw_only=True)
class AttackBound:
    """The most that any attack can reach: true positives at 1 % false positives, and area under the ROC curve."""

    true_positive_rate: float
    area_under_curve: float


def bound_from_epsilon(epsilon: float, *, delta: Fraction) -> AttackBound:
    """What (``epsilon``, ``delta``) alone allows, for any mechanism.

    The trade-off region of Kairouz, Oh and Viswanath (2015), https://arxiv.org/abs/1311.0776, has corners at
    (0, delta), (x, 1 - x) and (1 - delta, 1) with x = (1 - delta)/(1 + e^epsilon), hence the area
    1 - (1 - delta)^2 / (1 + e^epsilon).
    """
    outside = (1 - float(delta)) ** 2 / (1 + math.exp(min(epsilon, 700.0)))
    rate = strongest_attack(epsilon, delta=delta, false_positive_rate=FALSE_POSITIVE_RATE)
    return AttackBound(true_positive_rate=rate, area_under_curve=1 - outside)


def bound_from_rho(rho: Fraction) -> AttackBound:
    """What ``rho``-zCDP allows, under adjacency add or remove one: both directions of the divergence are bounded.

    At each order alpha the test's outcome, a coin with bias FPR or TPR, keeps Rényi divergence <= alpha rho; the
    intersection over orders is the best that can be said from rho alone: Zhu, Dong and Wang (2022),
    https://arxiv.org/abs/2106.08567, appendix F.3; Riess et al. (2026), https://arxiv.org/abs/2602.04562.
    """
    return _bound_from_rho(max(rho, Fraction(0)))


def bound_from_zcdp_epsilon(epsilon: float, *, delta: Fraction) -> AttackBound:
    """What a zCDP mechanism allows whose epsilon at ``delta`` is ``epsilon``; never weaker than that pair alone."""
    loose = bound_from_epsilon(epsilon, delta=delta)
    if epsilon > _LARGE_EPSILON:
        return loose
    rho = zcdp_rho(Fraction(max(epsilon, _SMALL_EPSILON)), delta=delta) + _RHO_MARGIN
    tight = bound_from_rho(rho)
    return AttackBound(
        true_positive_rate=min(loose.true_positive_rate, tight.true_positive_rate),
        area_under_curve=min(loose.area_under_curve, tight.area_under_curve),
    )


@cache
def _bound_from_rho(rho: Fraction) -> AttackBound:
    (rate,) = true_positive_rates(np.array([FALSE_POSITIVE_RATE]), rho=float(rho), excesses=_FINE)
    rates = true_positive_rates(_GRID, rho=float(rho), excesses=_COARSE)
    # Upper sum: the rate never falls along the grid, so each step is no lower than the curve beneath it.
    area = float(rates[1:].mean())
    return AttackBound(true_positive_rate=float(rate), area_under_curve=min(1.0, area))


def true_positive_rates(false_positive_rates: FloatArray, *, rho: float, excesses: FloatArray = _FINE) -> FloatArray:
    """The highest true-positive rate [points] at each of ``false_positive_rates`` [points] under ``rho``-zCDP.

    ``excesses`` [orders] are the orders less one at which the divergence is bounded.
    """
    low, high = false_positive_rates.copy(), np.ones_like(false_positive_rates)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        allowed = _within(middle, false_positive_rates, rho, excesses) & _within(
            false_positive_rates, middle, rho, excesses
        )
        low, high = np.where(allowed, middle, low), np.where(allowed, high, middle)
    return high


def _within(first: FloatArray, second: FloatArray, rho: float, excesses: FloatArray) -> npt.NDArray[np.bool_]:
    """Whether coins of bias ``first`` and ``second`` are within divergence alpha rho at every order; [points]."""
    excess = excesses[:, None]
    alpha = 1 + excess
    with np.errstate(divide="ignore", invalid="ignore"):
        heads = alpha * np.log(first) - excess * np.log(second)
        tails = alpha * np.log1p(-first) - excess * np.log1p(-second)
    # An outcome that one coin never shows adds nothing; one that only the other never shows is an infinite divergence.
    heads = np.where(first > 0, heads, -np.inf)
    tails = np.where(first < 1, tails, -np.inf)
    divergence = np.logaddexp(heads, tails) / excess
    return np.asarray((divergence <= alpha * rho).all(axis=0))
