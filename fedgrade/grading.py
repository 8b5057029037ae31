"""Grades are an ordered scale with a price list for mistakes; a decision is whatever is cheapest to be wrong about.

This room knows nothing of photos or models: it turns probabilities into grades and grades into money.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedgrade.errors import JobRefused

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MIN_GRADES, MAX_GRADES = 2, 32


@dataclass(frozen=True, kw_only=True)
class GradeScale:
    """Grades from best to worst; the order is the meaning.

    ``cost[true][decided]`` is what it costs, in any one currency, to sell an item of grade ``true`` as ``decided``.
    ``critical`` names the grades whose misses are reported before any other number.
    """

    name: str
    labels: tuple[str, ...]
    critical: tuple[str, ...]
    cost: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        grades = len(self.labels)
        if not MIN_GRADES <= grades <= MAX_GRADES:
            raise JobRefused(f"grading.labels: {grades} grades; a scale has {MIN_GRADES} to {MAX_GRADES}")
        if len(set(self.labels)) != grades or not all(label.strip() for label in self.labels):
            raise JobRefused(f"grading.labels: {self.labels!r} must be distinct and not empty")
        unknown = [label for label in self.critical if label not in self.labels]
        if unknown:
            raise JobRefused(f"grading.critical: {unknown[0]!r} is not one of {list(self.labels)}")
        if len(self.cost) != grades or any(len(row) != grades for row in self.cost):
            raise JobRefused(f"grading.cost: must be {grades} rows of {grades} numbers, one per grade")
        for true, row in enumerate(self.cost):
            if not np.isfinite(row).all() or min(row) < 0 or row[true] != 0:
                raise JobRefused(f"grading.cost[{true}]: costs are finite, not negative, and 0 for the right grade")

    @property
    def grades(self) -> int:
        """How many grades there are."""
        return len(self.labels)

    @property
    def critical_indices(self) -> tuple[int, ...]:
        """Positions of the critical grades on the scale."""
        return tuple(self.labels.index(label) for label in self.critical)

    def index(self, label: str) -> int:
        """Position of ``label``, from 0 (best).

        Raises:
            JobRefused: the scale has no such grade.
        """
        if label not in self.labels:
            raise JobRefused(f"grade {label!r} is not one of {list(self.labels)}")
        return self.labels.index(label)

    @property
    def cost_matrix(self) -> FloatArray:
        """``cost`` as an array [true grade, decided grade]."""
        return np.array(self.cost, dtype=np.float64)


def expected_costs(probabilities: FloatArray, scale: GradeScale) -> FloatArray:
    """Expected cost [items, decided grade] of each decision under ``probabilities`` [items, grade]."""
    return probabilities @ scale.cost_matrix


def decide(probabilities: FloatArray, scale: GradeScale) -> IntArray:
    """Grade [items] with the least expected cost; ties go to the worse grade, the safer mistake."""
    costs = expected_costs(probabilities, scale)
    worst_first = costs[:, ::-1]
    return np.asarray(scale.grades - 1 - np.argmin(worst_first, axis=1), dtype=np.int64)
