"""The arrays that travel behind messages: heads out to sites, releases back. Both sides read them through this file.

A network's numbers travel in single precision, as the change from a public starting point; their count is known from
the job alone, without torch.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedgrade.errors import ModelRefused
from fedgrade.job import TrainingJob
from fedgrade.model.weights import read_weights, write_weights
from fedgrade.privacy.grid import LARGEST_SUM
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import PoissonGaussian, Purpose

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
NetworkArray = npt.NDArray[np.float32]

# Weights of a converged head are far smaller; larger ones would be an attack on the arithmetic, not a model.
MAX_WEIGHT = 1e6
# What a site declares is rounded, never four times too small; noise passes fifty deviations in no lifetime.
_DECLARED_SLACK = 4
_DEVIATIONS = 50


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head as it travels, with the adapter or network below it if that is trained too.

    Attributes:
        thresholds: [grades - 1, dimensions + 1].
        centre: [dimensions], taken out of every feature vector.
        network: [parameters], the change from the public starting point; empty where the head alone is trained.
    """

    thresholds: FloatArray
    centre: FloatArray
    network: NetworkArray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    @classmethod
    def of(cls, job: TrainingJob, weights: FloatArray, centre: FloatArray) -> "Head":
        """The head of ``job`` with the numbers ``weights`` [parameters], thresholds first."""
        thresholds, inputs = job.head_shape()
        head, network = np.split(weights, [thresholds * inputs])
        return cls(thresholds=head.reshape(thresholds, inputs), centre=centre, network=network.astype(np.float32))


def read_head(raw: bytes, job: TrainingJob) -> Head:
    """The head in the safetensors blob ``raw``, of exactly the shapes that ``job`` trains.

    Raises:
        ModelRefused: other names, shapes, types or sizes of numbers.
    """
    thresholds, inputs = job.head_shape()
    expected = {"thresholds": ((thresholds, inputs), "float64"), "centre": ((inputs - 1,), "float64")}
    weights = read_weights(raw, expected={**expected, **_expected_network(job)})
    if max(float(np.abs(array).max(initial=0.0)) for array in weights.values()) > MAX_WEIGHT:
        raise ModelRefused(f"weights: an entry exceeds {MAX_WEIGHT:g} in size; no trained head looks like that")
    return Head(**weights)


def write_head(head: Head) -> bytes:
    """``head`` as the safetensors blob that :func:`read_head` reads."""
    arrays = {"thresholds": head.thresholds, "centre": head.centre}
    return write_weights({**arrays, **_written_network(head.network)}, metadata={})


def write_update(job: TrainingJob, update: FloatArray) -> bytes:
    """What DP-SGD changed, ``update`` [parameters], as the safetensors blob that :func:`read_release` reads."""
    head, network = np.split(update, [job.parameters - job.spec.model.network_parameters])
    return write_weights({"update": head, **_written_network(network.astype(np.float32))}, metadata={})


def write_release(release: IntArray) -> bytes:
    """Integers [numbers] on the grid, masked or not, as the safetensors blob that :func:`read_release` reads."""
    return write_weights({"release": release}, metadata={})


def read_release(raw: bytes, job: TrainingJob, purpose: Purpose, *, site: SiteId) -> npt.NDArray[Any]:
    """What ``site`` released: integers [numbers] on the grid, or a floating-point update [parameters] for DP-SGD.

    Guarantee: no honest site is refused; what a dishonest one can do to a sum is bounded, and sums never overflow.

    Raises:
        ModelRefused: other names, shapes or types, or a number that no honest site sends.
    """
    poisson = isinstance(job.plan.mechanism(purpose), PoissonGaussian)
    release: npt.NDArray[Any] = _read_update(raw, job) if poisson else read_masked(raw, job, purpose)
    limit = largest_release(job, purpose, site=site)
    # Both ends are looked at as they are: the absolute value of the least int64 is negative.
    if int(release.max()) > limit or int(release.min()) < -limit:
        raise ModelRefused(f"release of {site}: a number exceeds {limit:g} in size; no honest site sends that")
    return release


def read_masked(raw: bytes, job: TrainingJob, purpose: Purpose) -> IntArray:
    """Integers [numbers] of any size: under masks, they say nothing.

    Raises:
        ModelRefused: other names, shapes or types.
    """
    return read_weights(raw, expected={"release": ((release_size(job, purpose),), "int64")})["release"]


def largest_release(job: TrainingJob, purpose: Purpose, *, site: SiteId) -> int:
    """The size that no number in an honest release of ``site`` exceeds."""
    mechanism = job.plan.mechanism(purpose)
    if isinstance(mechanism, PoissonGaussian):
        return int(MAX_WEIGHT)
    items = _DECLARED_SLACK * job.declared_items[site]
    if purpose == "evaluate":
        # Sites declare their training items; the held-out ones are so many times more.
        items = math.ceil(items * max(1.0, job.spec.data.test_fraction / (1 - job.spec.data.test_fraction)))
    limit = items * mechanism.sensitivity + _DEVIATIONS * mechanism.scale
    return min(limit, LARGEST_SUM // len(job.declared_items))


def release_size(job: TrainingJob, purpose: Purpose) -> int:
    """How many numbers one release for ``purpose`` holds."""
    _, inputs = job.head_shape()
    return {"centre": inputs - 1, "train": job.parameters, "evaluate": job.spec.grading.grades**2}[purpose]


def _read_update(raw: bytes, job: TrainingJob) -> FloatArray:
    network = _expected_network(job)
    head = job.parameters - job.spec.model.network_parameters
    arrays = read_weights(raw, expected={"update": ((head,), "float64"), **network})
    return np.concatenate([arrays[part].astype(np.float64) for part in ("update", *network)])


def _expected_network(job: TrainingJob) -> dict[str, tuple[tuple[int, ...], str]]:
    size = job.spec.model.network_parameters
    return {"network": ((size,), "float32")} if size else {}


def _written_network(network: NetworkArray) -> dict[str, NetworkArray]:
    return {"network": network} if network.size else {}
