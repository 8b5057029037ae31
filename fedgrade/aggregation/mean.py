"""From what sites released to the next weights: a mean, a step, and an average of the last steps.

Divides by the number of items that sites *declared*, a public constant, never by a true count.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedgrade.errors import JobRefused, ModelRefused
from fedgrade.privacy.grid import from_grid
from fedgrade.privacy.plan import exact
from fedgrade.trust.records import DiscreteGaussian

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MIN_SUMMANDS = 2


@dataclass(frozen=True, kw_only=True)
class AggregationSpec:
    """How sites' answers become one, and how the coordinator steps then: with momentum, then the average of the last.

    Averaging costs no privacy and takes most of the noise out (Polyak and Juditsky 1992, doi 10.1137/0330046).

    Attributes:
        method: ``mean`` shows the coordinator each site's answer; ``secure_sum`` shows it their total alone.
        tolerate_dropouts: how many sites may vanish from a secure sum that they are committed to without ending it.
    """

    method: Literal["mean", "secure_sum"] = "mean"
    learning_rate: float
    momentum: float
    average_last: float
    minimum_sites: int
    tolerate_dropouts: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < np.inf:
            raise JobRefused(f"aggregation.learning_rate: {self.learning_rate} must be above 0")
        if not 0 <= self.momentum < 1:
            raise JobRefused(f"aggregation.momentum: {self.momentum} must be in [0, 1)")
        if not 0 < self.average_last <= 1:
            raise JobRefused(f"aggregation.average_last: {self.average_last} must be in (0, 1]")
        if self.minimum_sites < 1:
            raise JobRefused(f"aggregation.minimum_sites: {self.minimum_sites} must be at least 1")
        if self.tolerate_dropouts < 0 or (self.tolerate_dropouts and self.method != "secure_sum"):
            raise JobRefused(
                f"aggregation.tolerate_dropouts: {self.tolerate_dropouts} must be at least 0, and 0 unless "
                "aggregation.method is secure_sum; a mean needs none"
            )
        if self.method == "secure_sum" and self.minimum_sites < MIN_SUMMANDS:
            raise JobRefused(
                f"aggregation.minimum_sites: {self.minimum_sites}; a secure sum hides nothing with fewer than "
                f"{MIN_SUMMANDS}"
            )


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


def mean_of_total(total: IntArray, *, max_norm: float, mechanism: DiscreteGaussian, declared_items: int) -> FloatArray:
    """The noisy integer ``total`` as a mean over the ``declared_items`` of the sites that are in it."""
    return np.asarray(from_grid(total, max_norm=max_norm, mechanism=mechanism) / declared_items, dtype=np.float64)


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
