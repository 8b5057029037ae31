"""How good the released model is, as far as noised counts can tell."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fedgrade.evaluation import ConfusionCounts, GradingMetrics, metrics
from fedgrade.federation.verification import JobProof
from fedgrade.grading import GradeScale
from fedgrade.report.words import count_text, plain

# Redrawn noise shows how far noise alone moves a metric; the seed only makes the report reproducible.
REDRAWS, _SEED = 400, 20260101


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the confusion matrix; ``shade`` in [0, 1] is its share of its row."""

    count: str
    shade: float
    kind: str  # "right", "critical" or "other"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality section of one job; texts, ready to print."""

    kappa: str
    kappa_noise: str
    accuracy: str
    accuracy_noise: str
    miss_rate: str
    miss_noise: str
    missed: str
    missed_noise: str
    missed_at_most: str
    critical_items: str
    critical_labels: tuple[str, ...]
    mean_cost: str
    items: str
    cell_noise: str
    redraws: int
    sites: int
    labels: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def quality(job: JobProof) -> Quality | None:
    """What the published counts say; nothing if no model was published or no one evaluated it."""
    evaluations = [closed for closed in job.rounds if closed.purpose == "evaluate"]
    if job.release is None or not evaluations:
        return None
    release, scale = job.release.release, job.job.spec.grading
    sites = len(evaluations[-1].receipts)
    deviation = cell_deviation(job, sites=sites)
    noise = metric_deviation(release.counts, scale, deviation=deviation, sampled=False)
    table = np.maximum(release.counts.table, 0.0)
    critical = list(scale.critical_indices)
    safe = [grade for grade in range(scale.grades) if grade not in critical]
    missed = float(table[np.ix_(critical, safe)].sum())
    missed_noise = deviation * math.sqrt(len(critical) * len(safe))
    found = release.metrics
    return Quality(
        kappa=f"{found.quadratic_weighted_kappa:.3f}",
        kappa_noise=f"{noise.quadratic_weighted_kappa:.3f}",
        accuracy=f"{found.accuracy:.1%}".replace("%", " %"),
        accuracy_noise=f"{100 * noise.accuracy:.1f}",
        miss_rate=f"{found.critical_miss_rate:.1%}".replace("%", " %"),
        miss_noise=f"{100 * noise.critical_miss_rate:.1f}",
        missed=count_text(missed),
        missed_noise=f"{math.ceil(missed_noise):,}",
        missed_at_most=f"{math.ceil(missed + 2 * missed_noise):,}",
        critical_items=count_text(float(table[critical].sum())),
        critical_labels=tuple(plain(label) for label in scale.critical),
        mean_cost=f"{found.mean_cost:.3g}",
        items=count_text(found.items),
        cell_noise=f"{deviation:.1f}",
        redraws=REDRAWS,
        sites=sites,
        labels=tuple(plain(label) for label in scale.labels),
        rows=_rows(release.counts, scale),
    )


def cell_deviation(job: JobProof, *, sites: int) -> float:
    """Standard deviation of the noise in one cell of the merged counts: each of ``sites`` added its own."""
    mechanism = job.job.plan.evaluate
    return float(Fraction(mechanism.scale, mechanism.sensitivity)) * math.sqrt(sites)


def _rows(counts: ConfusionCounts, scale: GradeScale) -> tuple[tuple[Cell, ...], ...]:
    critical = set(scale.critical_indices)
    rows = []
    for true, row in enumerate(counts.table):
        total = float(np.maximum(row, 0.0).sum())
        cells = []
        for decided, count in enumerate(row):
            missed = true in critical and decided not in critical
            kind = "right" if true == decided else "critical" if missed else "other"
            cells.append(Cell(count=count_text(float(count)), shade=max(0.0, float(count)) / (total or 1.0), kind=kind))
        rows.append(tuple(cells))
    return tuple(rows)


def metric_deviation(counts: ConfusionCounts, scale: GradeScale, *, deviation: float, sampled: bool) -> GradingMetrics:
    """Standard deviation of each metric when the same noise is added to the published counts once more.

    ``sampled``: after as many items were drawn anew, each by itself, from the published table; the chance of who was
    held out is then in it, but for what items of one source have in common.
    """
    rng, table = np.random.default_rng(_SEED), np.maximum(counts.table, 0.0)
    total, shares = round(float(table.sum())), table.ravel() / (float(table.sum()) or 1.0)
    redrawn = []
    for _ in range(REDRAWS):
        drawn = rng.multinomial(total, shares).reshape(table.shape) if sampled and total else counts.table
        redrawn.append(metrics(ConfusionCounts.of(drawn + rng.normal(0.0, deviation, table.shape)), scale))
    return GradingMetrics(**{name: float(np.std([getattr(one, name) for one in redrawn])) for name in vars(redrawn[0])})
