"""Exact discrete Gaussian noise from the operating system's randomness. The one file that knows OpenDP.

OpenDP samples with integer arithmetic after Canonne, Kamath and Steinke (2020), https://arxiv.org/abs/2004.00010, and
takes its bits from the operating system. There is no seed to set, on purpose: whoever knows a seed can subtract the
noise.
"""

import numpy as np
import numpy.typing as npt
import opendp.prelude as opendp

from fedgrade.errors import PlanRefused

# Sums of up to 2^40 items on a 2^20 grid plus ten standard deviations of noise stay clear of 2^63.
MAX_SCALE = 2**52


def discrete_gaussian(size: int, *, scale: int) -> npt.NDArray[np.int64]:
    """``size`` independent draws from the discrete Gaussian of ``scale``, in grid units.

    Guarantee: exact; P(x) is proportional to exp(-x² / (2 scale²)) on the integers, with no floating-point rounding.

    Raises:
        PlanRefused: ``scale`` is not in [1, 2^52].
    """
    if not 1 <= scale <= MAX_SCALE:
        raise PlanRefused(f"noise scale {scale} must be in [1, 2^52] grid units")
    opendp.enable_features("contrib")
    domain = opendp.vector_domain(opendp.atom_domain(T="i64"))
    measurement = opendp.m.make_gaussian(domain, opendp.l2_distance(T="f64"), scale=float(scale))
    return np.array(measurement([0] * size), dtype=np.int64)
