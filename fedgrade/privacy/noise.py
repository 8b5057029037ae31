"""Noise and chance from the operating system's randomness: exact where the mode is. The one file that knows OpenDP.

OpenDP samples with integer arithmetic after Canonne, Kamath and Steinke (2020), https://arxiv.org/abs/2004.00010, and
takes its bits from the operating system. There is no seed to set, on purpose: whoever knows a seed can subtract the
noise. Nor is there a generator with a seed of its own: PyTorch's keeps 32 bits of what it is given, which is few enough
to try them all.
"""

import secrets

import numpy as np
import numpy.typing as npt
import opendp.prelude as opendp

from fedgrade.errors import PlanRefused
from fedgrade.privacy.grid import MAX_SCALE


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


def floating_gaussian(size: int, *, scale: float) -> npt.NDArray[np.float64]:
    """``size`` independent draws from the normal distribution of standard deviation ``scale``, in floating point.

    Box and Muller (1958), doi 10.1214/aoms/1177706645, on the operating system's bits. Not exact: floating-point noise
    is for ``local_sgd`` alone, and reports say so (Mironov 2012, doi 10.1145/2382196.2382264).
    """
    radius = np.sqrt(-2.0 * np.log1p(-_uniform(size)))
    return np.asarray(scale * radius * np.cos(2.0 * np.pi * _uniform(size)), dtype=np.float64)


def poisson_sample(size: int, *, rate: float) -> npt.NDArray[np.bool_]:
    """Which of ``size`` items join a batch, each on its own with probability ``rate``; nobody else can know."""
    return np.asarray(_uniform(size) < rate, dtype=np.bool_)


def _uniform(size: int) -> npt.NDArray[np.float64]:
    """Multiples of 2^-53 in [0, 1)."""
    words = np.frombuffer(secrets.token_bytes(8 * size), dtype=np.uint64)
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, dtype=np.float64)
