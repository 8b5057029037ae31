"""The arrays that travel behind messages: heads out to sites, releases back. Both sides read them through this file."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedgrade.errors import ModelRefused
from fedgrade.job import TrainingJob
from fedgrade.model.weights import read_weights, write_weights
from fedgrade.trust.records import PoissonGaussian, Purpose

FloatArray = npt.NDArray[np.float64]

# Weights of a converged head are far smaller; larger ones would be an attack on the arithmetic, not a model.
MAX_WEIGHT = 1e6


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head as it travels: ``thresholds`` [grades - 1, dimensions + 1] and the feature ``centre`` [dimensions]."""

    thresholds: FloatArray
    centre: FloatArray


def read_head(raw: bytes, job: TrainingJob) -> Head:
    """The head in the safetensors blob ``raw``, of exactly the shapes that ``job`` trains.

    Raises:
        ModelRefused: other names, shapes, types or sizes of numbers.
    """
    thresholds, inputs = job.head_shape()
    expected = {"thresholds": ((thresholds, inputs), "float64"), "centre": ((inputs - 1,), "float64")}
    weights = read_weights(raw, expected=expected)
    if max(float(np.abs(array).max(initial=0.0)) for array in weights.values()) > MAX_WEIGHT:
        raise ModelRefused(f"weights: an entry exceeds {MAX_WEIGHT:g} in size; no trained head looks like that")
    return Head(thresholds=weights["thresholds"], centre=weights["centre"])


def write_head(head: Head) -> bytes:
    """``head`` as the safetensors blob that :func:`read_head` reads."""
    return write_weights({"thresholds": head.thresholds, "centre": head.centre}, metadata={})


def read_release(raw: bytes, job: TrainingJob, purpose: Purpose) -> npt.NDArray[Any]:
    """What a site released: integers [parameters] on the grid, or a floating-point update for DP-SGD.

    Raises:
        ModelRefused: other names, shapes or types.
    """
    name, kind = ("release", "int64")
    if isinstance(job.plan.mechanism(purpose), PoissonGaussian):
        name, kind = ("update", "float64")
    return read_weights(raw, expected={name: ((release_size(job, purpose),), kind)})[name]


def release_size(job: TrainingJob, purpose: Purpose) -> int:
    """How many numbers one release for ``purpose`` holds."""
    thresholds, inputs = job.head_shape()
    return {"centre": inputs - 1, "train": thresholds * inputs, "evaluate": job.spec.grading.grades**2}[purpose]
