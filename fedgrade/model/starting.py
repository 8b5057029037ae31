"""Public starting points: numbers that anybody can compute again, bit for bit, from nothing but their names.

They are expanded from a hash (SHAKE-256, FIPS 202), not drawn from a library's generator, whose stream may change with
its version. Only the change from a starting point is ever trained, sent and signed.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

FeatureArray = npt.NDArray[np.float32]

# Part of every name: change it with any line below that changes a number.
_VERSION = "fedgrade starting point 1"
_BITS = 24  # what a float32 holds


def uniform(name: str, shape: tuple[int, ...], *, bound: float) -> FeatureArray:
    """The numbers of ``name`` in [-bound, bound), evenly spread."""
    size = math.prod(shape)
    raw = hashlib.shake_256(f"{_VERSION}: {name}".encode()).digest(4 * size)
    words = np.frombuffer(raw, dtype="<u4") >> np.uint32(32 - _BITS)
    unit = words.astype(np.float64) * 2.0 ** (1 - _BITS) - 1.0
    return (unit * bound).astype(np.float32).reshape(shape)


def parameter(name: str, shape: tuple[int, ...]) -> FeatureArray:
    """Where a network's parameter starts: kernels after He et al. (2015), norms as the identity.

    Arguments are timm's name and the shape: [out, in, height, width] of a kernel, [channels] of a norm's scale (one) or
    shift (zero). https://arxiv.org/abs/1502.01852
    """
    if len(shape) == 1:
        return np.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=np.float32)
    return uniform(name, shape, bound=math.sqrt(6.0 / math.prod(shape[1:])))
