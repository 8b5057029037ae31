"""The likelihood-ratio attack on membership: Carlini et al. (2022), https://arxiv.org/abs/2112.03570, online form.

Many models are trained, each on a random half of the same items. For one of them, the others say how confident a model
is in an item that it was shown and in one that it was not; the likelihood ratio of the two is the attack's score.
Knows nothing of how the models were trained.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

FALSE_POSITIVE_RATE = 0.01
REPETITIONS = 400  # of the bootstrap
COVERAGE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured number, and the ends of its two-sided 95 % confidence interval."""

    measured: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.measured:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class AttackPower:
    """How well an attack told members from others."""

    area_under_curve: Interval
    true_positive_rate: Interval


def random_halves(models: int, items: int, rng: np.random.Generator) -> BoolArray:
    """Who is shown to whom [models, items]: a coin each.

    In one model an item's own membership then says nothing about anyone else's, as the bound assumes; and nothing about
    its membership in other models, which shadows know: with each item in exactly half of the models it would.
    """
    return np.asarray(rng.random((models, items)) < 0.5)


def attack_scores(confidences: FloatArray, members: BoolArray) -> FloatArray:
    """Log-likelihood ratios [models, items] of membership, each model attacked with all the others as shadows.

    Args:
        confidences: [models, items], how sure each model is of each item's true grade.
        members: [models, items].

    Variances are shared by all items: with 32 models an item's own would be noise (Carlini et al., section VI-C).
    """
    return np.stack([_target_scores(confidences, members, target) for target in range(len(confidences))])


def power(scores: FloatArray, members: BoolArray, rng: np.random.Generator) -> AttackPower:
    """Area under the ROC curve, and true positives at 1 % false positives, of ``scores`` [models, items].

    Intervals: items and models are both drawn again, because one model's scores share its noise and one item's share
    its shadows (the pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122; conservative).
    """
    models, items = scores.shape
    order = np.argsort(-scores, axis=None, kind="stable")
    inside = members.ravel()[order]

    def both(weights: FloatArray) -> tuple[float, float]:
        return _area_and_rate(inside, weights.ravel()[order])

    drawn = np.array([
        both(np.outer(_drawn_again(models, rng), _drawn_again(items, rng))) for _ in range(REPETITIONS)
    ])  # fmt: skip
    area, rate = both(np.ones((models, items)))
    tails = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    low, high = np.quantile(drawn, tails, axis=0)
    return AttackPower(
        area_under_curve=Interval(measured=area, low=float(low[0]), high=float(high[0])),
        true_positive_rate=Interval(measured=rate, low=float(low[1]), high=float(high[1])),
    )


def _target_scores(confidences: FloatArray, members: BoolArray, target: int) -> FloatArray:
    others = np.arange(len(confidences)) != target
    seen, shown = confidences[others], members[others]
    found = confidences[target]
    return _log_likelihood(found, seen, shown) - _log_likelihood(found, seen, ~shown)


def _log_likelihood(found: FloatArray, seen: FloatArray, chosen: BoolArray) -> FloatArray:
    """Of ``found`` [items] under normals fitted to the ``chosen`` [models, items] of ``seen``; [items]."""
    models = np.maximum(chosen.sum(axis=0), 1)
    mean = np.where(chosen, seen, 0.0).sum(axis=0) / models
    shared = (np.where(chosen, seen - mean, 0.0) ** 2).sum() / (models - 1).sum()
    # A mean of few models is itself uncertain; else items that were seen by few would stand out for that.
    variance = shared * (1 + 1 / models)
    return np.asarray(-0.5 * ((found - mean) ** 2 / variance + np.log(variance)))


def _drawn_again(size: int, rng: np.random.Generator) -> FloatArray:
    return np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)


def _area_and_rate(inside: BoolArray, weights: FloatArray) -> tuple[float, float]:
    """From memberships and weights in the order of falling scores."""
    caught, raised = np.where(inside, weights, 0.0), np.where(inside, 0.0, weights)
    true_positives, false_positives = np.cumsum(caught) / caught.sum(), np.cumsum(raised) / raised.sum()
    # Trapezoids: each wrongly raised item counts the members above it.
    area = float((true_positives * raised).sum() / raised.sum())
    last = int(np.searchsorted(false_positives, FALSE_POSITIVE_RATE, side="right"))
    return area, float(true_positives[last - 1]) if last else 0.0
