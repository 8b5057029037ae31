"""Confusion counts that merge, and ordinal metrics taken from them last.

Counts arrive with noise, so they may be fractional or negative; metrics clamp the merged table, never a site's.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedgrade.errors import ModelRefused
from fedgrade.grading import GradeScale

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ConfusionCounts:
    """How many items of each true grade (row) were decided as each grade (column).

    A monoid: ``a.merge(b) == b.merge(a)``, and merging with :meth:`zero` changes nothing.
    """

    counts: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        grades = len(self.counts)
        if grades == 0 or any(len(row) != grades for row in self.counts):
            raise ModelRefused("confusion counts: a square table, one row and column a grade, is expected")
        if not np.isfinite(self.counts).all():
            raise ModelRefused("confusion counts: every count must be finite")

    @classmethod
    def zero(cls, grades: int) -> "ConfusionCounts":
        """The empty table."""
        return cls.of(np.zeros((grades, grades)))

    @classmethod
    def of(cls, table: FloatArray) -> "ConfusionCounts":
        """The counts in ``table`` [true grade, decided grade]."""
        return cls(counts=tuple(tuple(float(count) for count in row) for row in table))

    def merge(self, other: "ConfusionCounts") -> "ConfusionCounts":
        """Both sites' counts together."""
        if len(self.counts) != len(other.counts):
            raise ModelRefused(f"confusion counts: {len(self.counts)} grades do not merge with {len(other.counts)}")
        return ConfusionCounts.of(self.table + other.table)

    @property
    def table(self) -> FloatArray:
        """The counts as an array [true grade, decided grade]."""
        return np.array(self.counts, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class GradingMetrics:
    """What a table of counts says about a model; every rate is of the clamped, merged table."""

    quadratic_weighted_kappa: float
    accuracy: float
    critical_miss_rate: float
    mean_cost: float
    items: float


def item_rows(true: IntArray, decided: IntArray, *, grades: int) -> FloatArray:
    """One row [items, grades * grades] an item: 1 in the cell (true, decided), 0 elsewhere. Its L2 norm is 1."""
    rows = np.zeros((len(true), grades * grades))
    rows[np.arange(len(true)), true * grades + decided] = 1.0
    return rows


def metrics(counts: ConfusionCounts, scale: GradeScale) -> GradingMetrics:
    """The ordinal metrics of ``counts``; all zero for an empty table.

    Quadratic weighted kappa: Cohen (1968), doi 10.1037/h0026256. A critical miss is an item of a critical grade that
    was decided as a better, not critical one.
    """
    table = np.maximum(counts.table, 0.0)
    total = float(table.sum())
    if total == 0:
        return GradingMetrics(
            quadratic_weighted_kappa=0.0, accuracy=0.0, critical_miss_rate=0.0, mean_cost=0.0, items=0.0
        )
    critical = list(scale.critical_indices)
    of_critical = float(table[critical].sum())
    missed = sum(float(table[grade, better]) for grade in critical for better in range(grade) if better not in critical)
    return GradingMetrics(
        quadratic_weighted_kappa=quadratic_weighted_kappa(table),
        accuracy=float(np.trace(table)) / total,
        critical_miss_rate=missed / of_critical if of_critical else 0.0,
        mean_cost=float((table * scale.cost_matrix).sum()) / total,
        items=total,
    )


def quadratic_weighted_kappa(table: FloatArray) -> float:
    """Cohen's (1968) weighted kappa of ``table`` [true, decided] with squared distances; 0 where it is undefined."""
    total = float(table.sum())
    if total == 0:
        return 0.0
    grades = np.arange(len(table))
    weight = np.square(grades[:, None] - grades[None, :]).astype(np.float64)
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / total
    chance = float((weight * expected).sum())
    return 1.0 - float((weight * table).sum()) / chance if chance else 0.0
