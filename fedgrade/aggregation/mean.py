"""From what sites released to the next weights: a mean, a step, and an average of the last steps.

Divides by the number of items that sites *declared*, a public constant, never by a true count.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedgrade.errors import JobRefused, ModelRefused
from fedgrade.privacy.grid import from_grid
from fedgrade.privacy.plan import exact
from fedgrade.trust.records import DiscreteGaussian

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class AggregationSpec:
    """How the coordinator steps: gradient descent with momentum, then the average of the last iterates.

    Averaging costs no privacy and takes most of the noise out (Polyak and Juditsky 1992, doi 10.1137/0330046).
    """

    learning_rate: float
    momentum: float
    average_last: float
    minimum_sites: int

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < np.inf:
            raise JobRefused(f"aggregation.learning_rate: {self.learning_rate} must be above 0")
        if not 0 <= self.momentum < 1:
            raise JobRefused(f"aggregation.momentum: {self.momentum} must be in [0, 1)")
        if not 0 < self.average_last <= 1:
            raise JobRefused(f"aggregation.average_last: {self.average_last} must be in (0, 1]")
        if self.minimum_sites < 1:
            raise JobRefused(f"aggregation.minimum_sites: {self.minimum_sites} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """The coordinator's side of training between two rounds. Arrays are [parameters] of the job, in its order."""

    weights: FloatArray
    velocity: FloatArray
    average: FloatArray
    averaged: int

    @classmethod
    def start(cls, weights: FloatArray) -> "ServerState":
        """Before the first round."""
        return cls(weights=weights, velocity=np.zeros_like(weights), average=np.zeros_like(weights), averaged=0)


def sum_of_releases(releases: Collection[IntArray]) -> IntArray:
    """The exact sum of what sites released.

    Raises:
        ModelRefused: nothing was released, or shapes differ.
    """
    if not releases or len({release.shape for release in releases}) != 1:
        raise ModelRefused("aggregation: at least one release is needed, all of one shape")
    return np.asarray(np.sum(np.stack(list(releases)), axis=0, dtype=np.int64), dtype=np.int64)


def mean_of_releases(
    releases: Collection[IntArray], *, max_norm: float, mechanism: DiscreteGaussian, declared_items: int
) -> FloatArray:
    """Noisy integer sums as one mean over the ``declared_items`` of the sites that released them."""
    total = from_grid(sum_of_releases(releases), max_norm=max_norm, mechanism=mechanism)
    return np.asarray(total / declared_items, dtype=np.float64)


def mean_of_updates(updates: Collection[tuple[FloatArray, int]]) -> FloatArray:
    """Updates averaged in proportion to each site's declared items (McMahan et al. 2017, arXiv 1602.05629).

    Raises:
        ModelRefused: nothing was uploaded, or shapes differ.
    """
    # Shapes that differ may still broadcast, and pass for a mean.
    if not updates or len({update.shape for update, _ in updates}) != 1:
        raise ModelRefused("aggregation: at least one update is needed, all of one shape")
    total = sum(items for _, items in updates)
    return np.asarray(sum(update * (items / total) for update, items in updates), dtype=np.float64)


def descend(
    state: ServerState, gradient: FloatArray, *, spec: AggregationSpec, round_index: int, rounds: int
) -> ServerState:
    """One step against ``gradient`` with momentum; from the last ``average_last`` of rounds on, also averaged."""
    velocity = spec.momentum * state.velocity + gradient
    weights = state.weights - spec.learning_rate * velocity
    return _averaged(replace(state, weights=weights, velocity=velocity), spec, round_index, rounds)


def add_update(
    state: ServerState, update: FloatArray, *, spec: AggregationSpec, round_index: int, rounds: int
) -> ServerState:
    """The weights moved by sites' mean ``update``; from the last ``average_last`` of rounds on, also averaged."""
    return _averaged(replace(state, weights=state.weights + update), spec, round_index, rounds)


def final_weights(state: ServerState) -> FloatArray:
    """The average of the last iterates; the last one itself if none was averaged."""
    return state.average if state.averaged else state.weights


def _averaged(state: ServerState, spec: AggregationSpec, round_index: int, rounds: int) -> ServerState:
    # Exactly: in floating point, the last 0.7 of ten rounds would be six.
    if round_index < rounds * (1 - exact(spec.average_last)):
        return state
    averaged = state.averaged + 1
    average = state.average + (state.weights - state.average) / averaged
    return replace(state, average=average, averaged=averaged)
