"""Quality against privacy on real photos: pooled, federated and each site alone, over module-disjoint folds.

Trains with the product's own plan, head, clipping rule and server step. Two things are replaced, to fit hundreds of
runs into minutes: the exact sum on the integer grid by a matrix product of the same clipped gradients, and the exact
discrete Gaussian by a float Gaussian of the same scale (at scales near 10^7 grid units nobody can tell them apart by
quality; the product never does this).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedgrade.aggregation.mean import ServerState, descend, final_weights
from fedgrade.data import elpv
from fedgrade.evaluation import ConfusionCounts, item_rows
from fedgrade.grading import decide
from fedgrade.job import JobSpec
from fedgrade.model.head import exceedances, grade_probabilities, head_inputs, unit_features
from fedgrade.privacy.plan import LocalSpec, PrivacyPlan, calibrate

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

FOLDS = 5
EPSILONS = (None, 8.0, 4.0, 2.0, 1.0)
SETTINGS = ("pooled", "federated", "alone")


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Every demo photo: features [photos, dimensions], grade, fold of its module, recycler; all [photos]."""

    features: FloatArray
    grades: IntArray
    folds: IntArray
    sites: IntArray


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One training and test: confusion tables over all folds, by the cheapest decision and by the median grade."""

    setting: str
    epsilon: float | None
    seed: int
    counts: ConfusionCounts
    median_counts: ConfusionCounts


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a linear head minimises: its gradient is (predicted - target) x for each output.

    Attributes:
        targets: [photos, outputs] of grades [photos] on a scale of so many grades.
        predicted: [photos, outputs] of weights [outputs, inputs] and inputs [photos, inputs].
        decided: grades [photos] that the field's reading takes from weights and inputs.
    """

    targets: Callable[[IntArray, int], FloatArray]
    predicted: Callable[[FloatArray, FloatArray], FloatArray]
    decided: Callable[[FloatArray, FloatArray], IntArray]


def median_grades(weights: FloatArray, inputs: FloatArray) -> IntArray:
    """The median grade [photos] of the ordinal head's probabilities."""
    probabilities = grade_probabilities(weights, inputs)
    return np.asarray(np.minimum((probabilities.cumsum(axis=1) < 0.5).sum(axis=1), len(weights)))


ORDINAL = Loss(
    targets=lambda grades, scale: (grades[:, None] > np.arange(scale - 1)).astype(np.float64),
    predicted=exceedances,
    decided=median_grades,
)


def load_photos(features: FloatArray) -> Photos:
    """Facts about the demo's cells beside their ``features``, in the package's order."""
    cells, folds = elpv.cells(), elpv.module_folds(FOLDS)
    recycler = {run: index for index, runs in enumerate(elpv.RECYCLERS.values()) for run in runs}
    return Photos(
        features=unit_features(features),
        grades=np.array([cell.grade for cell in cells]),
        folds=np.array([folds[cell.module] for cell in cells]),
        sites=np.array([recycler[cell.run] for cell in cells]),
    )


def train(photos: Photos, chosen: npt.NDArray[np.bool_], spec: JobSpec, *, plan: PrivacyPlan | None, shares: int,
          rng: np.random.Generator, loss: Loss = ORDINAL, precision: type[np.floating[Any]] = np.float64,
          ) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """Head and centre trained on the ``chosen`` photos; ``shares`` sites each add the plan's noise in full.

    Products of photos and weights are taken in ``precision``: they are all the time it takes.
    """
    features, grades, items = photos.features[chosen], photos.grades[chosen], int(chosen.sum())
    noise = 0.0 if plan is None else np.sqrt(shares)
    centre = features.sum(axis=0)
    if plan is not None:
        centre += rng.normal(size=centre.shape) * noise * plan.centre.scale / plan.centre.sensitivity
    centre /= items
    inputs = head_inputs(features, centre).astype(precision)
    lengths = np.linalg.norm(inputs, axis=1)
    targets = loss.targets(grades, spec.grading.grades)
    state = ServerState.start(np.zeros((targets.shape[1], inputs.shape[1])))
    rounds = spec.privacy.rounds
    for index in range(rounds):
        residuals = loss.predicted(state.weights.astype(precision), inputs) - targets
        if plan is not None:
            norms = np.linalg.norm(residuals, axis=1) * lengths
            residuals *= np.minimum(1.0, plan.max_grad_norm / np.maximum(norms, 1e-12))[:, None]
        gradient = np.asarray(residuals.T.astype(precision) @ inputs, dtype=np.float64)
        if plan is not None:
            scale = noise * plan.max_grad_norm * plan.train.scale / plan.train.sensitivity
            gradient += rng.normal(size=gradient.shape) * scale
        state = descend(state, gradient / items, spec=spec.aggregation, round_index=index, rounds=rounds)
    return final_weights(state), centre


def evaluate(
    photos: Photos, chosen: npt.NDArray[np.bool_], spec: JobSpec, head: tuple[FloatArray, FloatArray]
) -> tuple[ConfusionCounts, ConfusionCounts]:
    """Exact counts on the ``chosen`` photos, by the cheapest decision and by the median grade.

    A benchmark on public data, not a release.
    """
    weights, centre = head
    inputs, true = head_inputs(photos.features[chosen], centre), photos.grades[chosen]
    cheapest = decide(grade_probabilities(weights, inputs), spec.grading)
    return counted(true, cheapest, spec), counted(true, median_grades(weights, inputs), spec)


def outcome(photos: Photos, spec: JobSpec, *, setting: str, epsilon: float | None, seed: int) -> Outcome:
    """One seed over all module-disjoint folds; ``alone`` trains each site by itself and tests it on every site."""
    rng = np.random.default_rng(seed)
    plan = None if epsilon is None else calibrate(privacy_at(spec, epsilon), participants=len(elpv.RECYCLERS))
    counts = median_counts = ConfusionCounts.zero(spec.grading.grades)
    for fold in range(FOLDS):
        test, rest = photos.folds == fold, photos.folds != fold
        groups = {
            "pooled": [(rest, 1)],
            "federated": [(rest, len(elpv.RECYCLERS))],
            "alone": [(rest & (photos.sites == site), 1) for site in range(len(elpv.RECYCLERS))],
        }[setting]
        for chosen, shares in groups:
            head = train(photos, chosen, spec, plan=plan, shares=shares, rng=rng)
            cheapest, median = evaluate(photos, test, spec, head)
            counts, median_counts = counts.merge(cheapest), median_counts.merge(median)
    return Outcome(setting=setting, epsilon=epsilon, seed=seed, counts=counts, median_counts=median_counts)


def privacy_at(spec: JobSpec, epsilon: float) -> LocalSpec:
    """The job's privacy, at another epsilon."""
    if not isinstance(spec.privacy, LocalSpec):
        raise TypeError("the quality benchmark compares full-batch training")
    return replace(spec.privacy, target_epsilon=epsilon)


def counted(true: IntArray, decided: IntArray, spec: JobSpec) -> ConfusionCounts:
    """Exact counts of ``decided`` [photos] against ``true`` [photos]."""
    grades = spec.grading.grades
    return ConfusionCounts.of(item_rows(true, decided, grades=grades).sum(axis=0).reshape(grades, grades))
