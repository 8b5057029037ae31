"""Rows clipped onto an integer grid, and sums with integer noise: what the integer modes send comes through here.

Means and counts become rows here; gradients, by far the most numbers, in :mod:`fedgrade.full_batch`.

Sensitivity: adding or removing one item adds or removes one row, whose L2 norm is at most the mechanism's
``sensitivity`` by an exact integer check, whatever the row held before. Hence the sum moves by at most that much, and
discrete Gaussian noise on the same grid gives exactly the rho that :class:`DiscreteGaussian` states.
"""

import numpy as np
import numpy.typing as npt

from fedgrade.errors import PlanRefused
from fedgrade.trust.records import DiscreteGaussian

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Rounding toward zero cannot lengthen a row; this margin covers the floating-point division before it.
_SHRINK = 1.0 - 2.0**-20
_LARGEST_SQUARE = 2**63 - 1
# Noise up to here, ten standard deviations of it, and sums of up to 2^22 items on a grid of 2^40 stay clear of 2^63.
MAX_SCALE = 2**52
# Every sum of releases stays clear of what 64 bits hold, whoever lies: each site has its part of this.
LARGEST_SUM = 2**62


def clip_rows(rows: FloatArray, max_norm: float) -> FloatArray:
    """Scale each row of ``rows`` [items, parameters] to L2 norm <= ``max_norm``, up to rounding.

    Guarantee: holds for zero and huge rows; a row with NaN or infinity becomes zero, because one item must not be able
    to poison the sum. Abadi et al. (2016), https://arxiv.org/abs/1607.00133.
    """
    finite = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    # Scaling by the largest entry first keeps the squares of huge entries from overflowing.
    largest = np.abs(finite).max(axis=1, keepdims=True, initial=0.0)
    unit = np.divide(finite, largest, out=np.zeros_like(finite), where=largest > 0)
    norms = np.sqrt(np.einsum("ij,ij->i", unit, unit))[:, None]
    limit = np.divide(max_norm, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.asarray(unit * np.minimum(largest, limit), dtype=np.float64)


def grid_rows(rows: FloatArray, *, max_norm: float, mechanism: DiscreteGaussian) -> IntArray:
    """``rows`` [items, parameters], clipped to ``max_norm`` and put on the mechanism's integer grid.

    Guarantee: every row's squared integer norm is at most ``sensitivity``²; a row that is not is dropped to zero.

    Raises:
        PlanRefused: squares on this grid do not fit 64 bits, so that norms could not be checked exactly.
    """
    if mechanism.sensitivity**2 * max(1, rows.shape[1]) > _LARGEST_SQUARE:
        raise PlanRefused(
            f"grid: sensitivity {mechanism.sensitivity} with {rows.shape[1]} parameters; the square of one times the "
            "other must stay below 2^63"
        )
    limit = mechanism.sensitivity
    # Divided by the clip before anything else: the clip comes from the job, and limit / clip could be infinite.
    integers = np.trunc(clip_rows(rows, max_norm) / max_norm * (limit * _SHRINK)).astype(np.int64)
    # Entry by entry first: only then can no sum of squares wrap around and pass for small.
    integers[((integers < -limit) | (integers > limit)).any(axis=1)] = 0
    squared = np.einsum("ij,ij->i", integers, integers)
    integers[squared > limit**2] = 0
    return np.asarray(integers, dtype=np.int64)


def add_noise(total: IntArray, *, noise: IntArray) -> IntArray:
    """The exact ``total`` [parameters] of grid rows plus ``noise`` [parameters], exactly.

    ``noise`` is an argument, drawn before any item is read, so that the time it took says nothing about them.

    Raises:
        PlanRefused: the shapes differ, so some of the total would have no noise of its own.
    """
    if total.shape != noise.shape:
        raise PlanRefused(f"noise of shape {noise.shape} does not fit a total of shape {total.shape}")
    return np.asarray(total + noise, dtype=np.int64)


def from_grid(total: IntArray, *, max_norm: float, mechanism: DiscreteGaussian) -> FloatArray:
    """A noisy integer sum back in the units of the rows."""
    return np.asarray(total * (max_norm / mechanism.sensitivity), dtype=np.float64)
