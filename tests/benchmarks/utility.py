"""Ways of training a head under privacy, side by side: who adds the noise, with whom one trains, and which loss.

The recipe of each epsilon was picked elsewhere, on random splits of these same public photos; folds here are disjoint
by module, so that no test photo has a neighbour from its own module in training.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from quality import FOLDS, ORDINAL, FloatArray, IntArray, Loss, Photos, counted, privacy_at, train

from fedgrade.data import elpv
from fedgrade.evaluation import ConfusionCounts, metrics
from fedgrade.job import JobSpec
from fedgrade.model.head import head_inputs
from fedgrade.privacy.plan import calibrate

EPSILONS = (None, 1.0, 2.0, 4.0, 8.0)
ROUNDS = {None: 200, 1.0: 40, 2.0: 80, 4.0: 150, 8.0: 200}
SEEDS = 2


def _softmax(weights: FloatArray, inputs: FloatArray) -> FloatArray:
    scores = inputs @ weights.T
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(chances / chances.sum(axis=1, keepdims=True))


def _likeliest(weights: FloatArray, inputs: FloatArray) -> IntArray:
    return np.asarray((inputs @ weights.T).argmax(axis=1))


def _one_of(grades: IntArray, scale: int) -> FloatArray:
    return np.eye(scale)[grades]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the table.

    ``shares`` are the sites' shares of noise that the aggregate carries; ``alone`` trains each site by itself.
    """

    name: str
    learning_rate: float
    shares: int = 1
    alone: bool = False
    softmax: bool = False

    @property
    def loss(self) -> Loss:
        """What its head minimises."""
        return Loss(targets=_one_of, predicted=_softmax, decided=_likeliest) if self.softmax else ORDINAL


METHODS = (
    Method(name="A ordinal head, noise shared by the sites", learning_rate=4.0),
    Method(name="B the same, each site's noise in full (`local`)", learning_rate=2.0, shares=len(elpv.RECYCLERS)),
    Method(name="C the same, each site by itself", learning_rate=2.0, alone=True),
    Method(name="D softmax head, noise shared by the sites", learning_rate=4.0, softmax=True),
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One method at one epsilon on one seed of noise, over all folds."""

    method: Method
    epsilon: float | None
    seed: int
    spec: JobSpec
    photos: Photos


def utility(spec: JobSpec, photos: Photos) -> str:
    """The table: QWK with its spread, accuracy and macro-F1."""
    trials = [
        Trial(method=method, epsilon=epsilon, seed=seed, spec=spec, photos=photos)
        for method in METHODS
        for epsilon in EPSILONS
        for seed in range(SEEDS if epsilon else 1)
    ]
    folds = []
    for trial in trials:
        folds.append(fold_counts(trial))
        sys.stderr.write(f"utility: {trial.method.name} at epsilon {trial.epsilon}\n")
    lines = ["| method | " + " | ".join("ε = ∞" if e is None else f"ε = {e:g}" for e in EPSILONS) + " |"]
    lines.append("|---" * (len(EPSILONS) + 1) + "|")
    for method in METHODS:
        cells = []
        for epsilon in EPSILONS:
            of_both = zip(trials, folds, strict=True)
            runs = [counts for trial, counts in of_both if (trial.method, trial.epsilon) == (method, epsilon)]
            cells.append(_cell(runs, spec))
        lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
    setup = (
        f"QWK of all folds together / accuracy / macro-F1, ± standard deviation of QWK over single folds and seeds; "
        f"{FOLDS} module-disjoint folds, {len(elpv.RECYCLERS)} recyclers, {SEEDS} noise seeds (one without privacy); "
        "clip 1, a tenth of the budget for the centre, momentum 0.9, average of the last half; 40, 80, 150 and 200 "
        "rounds for ε = 1, 2, 4 and 8; learning rate 4 (A, D) or 2 (B, C). A and D carry one site's noise in all, as "
        "`distributed` does without a floor. Ordinal heads are read by the median grade, softmax by the likeliest."
    )
    return "\n".join([setup, "", *lines])


def fold_counts(trial: Trial) -> list[ConfusionCounts]:
    """Exact counts of each fold; a benchmark on public data, not a release."""
    rng = np.random.default_rng(trial.seed)
    spec, method = _recipe(trial), trial.method
    plan = None if trial.epsilon is None else calibrate(spec.privacy, participants=len(elpv.RECYCLERS))
    counts = []
    for fold in range(FOLDS):
        of_fold = ConfusionCounts.zero(spec.grading.grades)
        for chosen in _groups(trial, fold):
            weights, centre = train(
                trial.photos, chosen, spec, plan=plan, shares=method.shares, rng=rng, loss=method.loss,
                precision=np.float32,
            )  # fmt: skip
            test = trial.photos.folds == fold
            decided = method.loss.decided(weights, head_inputs(trial.photos.features[test], centre))
            of_fold = of_fold.merge(counted(trial.photos.grades[test], decided, spec))
        counts.append(of_fold)
    return counts


def _recipe(trial: Trial) -> JobSpec:
    privacy = privacy_at(trial.spec, trial.epsilon or max(filter(None, EPSILONS)))
    return replace(
        trial.spec,
        privacy=replace(privacy, rounds=ROUNDS[trial.epsilon]),
        aggregation=replace(trial.spec.aggregation, learning_rate=trial.method.learning_rate),
    )


def _groups(trial: Trial, fold: int) -> Iterator[np.ndarray]:
    """Who trains together: masks [photos]."""
    rest = trial.photos.folds != fold
    if not trial.method.alone:
        yield rest
        return
    for site in range(len(elpv.RECYCLERS)):
        yield rest & (trial.photos.sites == site)


def _cell(runs: list[list[ConfusionCounts]], spec: JobSpec) -> str:
    together = [_merged(folds) for folds in runs]
    figures = [metrics(counts, spec.grading) for counts in together]
    single = [metrics(counts, spec.grading).quadratic_weighted_kappa for folds in runs for counts in folds]
    kappa = statistics.mean(one.quadratic_weighted_kappa for one in figures)
    accuracy = statistics.mean(one.accuracy for one in figures)
    macro_f1 = statistics.mean(_macro_f1(counts) for counts in together)
    return f"**{kappa:.3f}** ± {statistics.stdev(single):.3f} / {accuracy:.3f} / {macro_f1:.3f}"


def _merged(folds: list[ConfusionCounts]) -> ConfusionCounts:
    total = folds[0]
    for counts in folds[1:]:
        total = total.merge(counts)
    return total


def _macro_f1(counts: ConfusionCounts) -> float:
    """Mean over grades of the harmonic mean of precision and recall; a grade that is never decided has none."""
    table = counts.table
    both = table.sum(axis=0) + table.sum(axis=1)
    return float(np.mean(np.divide(2 * np.diag(table), both, out=np.zeros(len(table)), where=both > 0)))
