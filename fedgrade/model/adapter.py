"""A bottleneck on frozen features: x + U max(0, D x), in numpy; training has the same in torch.

``D`` [rank, dimensions] starts as a public random projection, ``U`` [dimensions, rank] at zero, so that training starts
from the frozen features themselves (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedgrade.errors import ModelRefused
from fedgrade.model.head import head_inputs, scores
from fedgrade.model.spec import ModelSpec
from fedgrade.model.starting import uniform

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """``down`` [rank, dimensions] and ``up`` [dimensions, rank]."""

    down: FloatArray
    up: FloatArray

    @classmethod
    def changed(cls, spec: ModelSpec, change: npt.NDArray[np.float32]) -> "Adapter":
        """The adapter of ``spec`` that is ``change`` [parameters] away from its public start; ``down`` comes first.

        Raises:
            ModelRefused: ``change`` is of another length.
        """
        if change.shape != (spec.network_parameters,):
            raise ModelRefused(
                f"adapter: a change of shape {change.shape} does not fit {spec.network_parameters} parameters"
            )
        shape = (spec.adapter_rank, spec.feature_dimensions)
        # Entries of variance 1 / rank: a projection that keeps lengths, on average.
        start = uniform(f"adapter {shape}", shape, bound=math.sqrt(3.0 / spec.adapter_rank)).astype(np.float64)
        down, up = np.split(change.astype(np.float64), [start.size])
        return cls(down=start + down.reshape(shape), up=up.reshape(shape[::-1]).copy())

    def adapted(self, inputs: FloatArray) -> FloatArray:
        """The head's inputs [photos, dimensions + 1] with the adapter's addition; the bias feature stays.

        Guarantee: a row depends on its own photo alone, to the last bit, as in :func:`fedgrade.model.head.scores`.
        """
        hidden = np.maximum(scores(self.down, inputs[:, :-1]), 0.0)
        return np.concatenate([inputs[:, :-1] + scores(self.up, hidden), inputs[:, -1:]], axis=1)


def graded_inputs(
    spec: ModelSpec, features: npt.ArrayLike, *, centre: FloatArray, change: npt.NDArray[np.float32]
) -> FloatArray:
    """What the thresholds see [photos, dimensions + 1] of ``features`` [photos, dimensions], adapted where ``spec`` is.

    Guarantee: a row depends on its own photo alone, to the last bit.
    """
    inputs = head_inputs(features, centre)
    return Adapter.changed(spec, change).adapted(inputs) if spec.trainable == "adapter" else inputs
