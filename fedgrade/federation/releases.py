"""What a site computes from its items once it may: the arrays of one release, and nothing that decides whether.

Every function here takes rows that are sensitive and returns bytes that may leave, or raises. No ledger, no policy, no
network.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

import numpy as np
import numpy.typing as npt

from fedgrade.data.manifest import Split
from fedgrade.errors import JobRefused
from fedgrade.evaluation import item_rows
from fedgrade.federation.payloads import Head, release_size
from fedgrade.grading import decide
from fedgrade.job import TrainingJob
from fedgrade.model.head import grade_probabilities, head_inputs, item_mean, unit_features
from fedgrade.model.weights import write_weights
from fedgrade.privacy.grid import add_noise, grid_rows
from fedgrade.privacy.noise import discrete_gaussian
from fedgrade.privacy.plan import LocalSgdSpec
from fedgrade.training import ItemBatch, SgdRecipe, clipped_gradient_sum, train_by_sgd
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import DiscreteGaussian, PoissonGaussian, Purpose

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SiteRows:
    """One side of a site's data as numbers: sensitive, never stored or sent.

    Attributes:
        features: [photos, dimensions].
        item_index: [photos], the item each photo shows, counted from 0.
        grades: [items], positions on the scale.
        batches: what the head sees of the training items, by the centre it was made for; rounds share one centre.
    """

    features: FloatArray
    item_index: IntArray
    grades: IntArray
    batches: dict[bytes, ItemBatch] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "SiteRows(<sensitive>)"

    @property
    def items(self) -> int:
        """How many items there are."""
        return len(self.grades)


def compute_release(
    job: TrainingJob, purpose: Purpose, head: Head, *, site: SiteId, rows: Callable[[Split], SiteRows]
) -> bytes:
    """The arrays of one release as safetensors: ``release`` (noisy integers) or, for DP-SGD, ``update``.

    Guarantee: costs exactly ``job.plan.mechanism(purpose)``. Noise is drawn before ``rows`` is first called.
    """
    mechanism = job.plan.mechanism(purpose)
    if isinstance(mechanism, PoissonGaussian):
        return write_weights({"update": _sgd_update(job, head, rows(Split.TRAIN), mechanism, site=site)}, metadata={})
    noise = discrete_gaussian(release_size(job, purpose), scale=mechanism.scale)
    match purpose:
        case "centre":
            total = feature_sum(rows(Split.TRAIN), mechanism)
        case "train":
            total = gradient_sum(job, head, rows(Split.TRAIN), mechanism)
        case "evaluate":
            total = confusion_sum(job, head, rows(Split.TEST), mechanism)
        case _:
            assert_never(purpose)
    return write_weights({"release": add_noise(total, noise=noise)}, metadata={})


def feature_sum(rows: SiteRows, mechanism: DiscreteGaussian) -> IntArray:
    """Sum [dimensions] over items of their mean unit features, on the grid."""
    means = item_mean(unit_features(rows.features), rows.item_index, rows.items)
    return _summed(grid_rows(means, max_norm=1.0, mechanism=mechanism))


def gradient_sum(job: TrainingJob, head: Head, rows: SiteRows, mechanism: DiscreteGaussian) -> IntArray:
    """Sum over items of their clipped gradients [thresholds * inputs], on the grid."""
    batch = _item_batch(rows, head.centre)
    return clipped_gradient_sum(head.thresholds, batch, max_grad_norm=job.plan.max_grad_norm, mechanism=mechanism)


def confusion_sum(job: TrainingJob, head: Head, rows: SiteRows, mechanism: DiscreteGaussian) -> IntArray:
    """Confusion counts [grades * grades] of the head's cheapest decisions, on the grid."""
    scale = job.spec.grading
    probabilities = grade_probabilities(head.thresholds, head_inputs(rows.features, head.centre))
    decided = decide(item_mean(probabilities, rows.item_index, rows.items), scale)
    cells = item_rows(rows.grades, decided, grades=scale.grades)
    return _summed(grid_rows(cells, max_norm=1.0, mechanism=mechanism))


def _sgd_update(
    job: TrainingJob, head: Head, rows: SiteRows, mechanism: PoissonGaussian, *, site: SiteId
) -> FloatArray:
    spec = job.spec.privacy
    if not isinstance(spec, LocalSgdSpec):
        raise JobRefused(f"privacy.mode {spec.mode!r} has no local steps")
    # Batches are scaled by the declared number of items: dividing by the true one would release it.
    recipe = SgdRecipe(
        mechanism=mechanism,
        max_grad_norm=job.plan.max_grad_norm,
        learning_rate=spec.learning_rate,
        declared_items=job.declared_items[site],
    )
    return train_by_sgd(head.thresholds, _item_batch(rows, head.centre), recipe).ravel()


def _item_batch(rows: SiteRows, centre: FloatArray) -> ItemBatch:
    """The items as the head sees them around ``centre``; made once for all rounds that share it."""
    key = centre.tobytes()
    if key not in rows.batches:
        rows.batches.clear()
        rows.batches[key] = _padded(rows, centre)
    return rows.batches[key]


def _padded(rows: SiteRows, centre: FloatArray) -> ItemBatch:
    """Items' photos side by side, padded with photos of weight zero to the item with most."""
    inputs = head_inputs(rows.features, centre)
    photos = np.bincount(rows.item_index, minlength=rows.items)
    most = int(photos.max(initial=1))
    position = np.arange(len(inputs)) - np.repeat(np.cumsum(photos) - photos, photos)
    padded = np.zeros((rows.items, most, inputs.shape[1]))
    padded[rows.item_index, position] = inputs
    weights = np.where(np.arange(most) < photos[:, None], 1.0 / np.maximum(photos, 1)[:, None], 0.0)
    return ItemBatch(inputs=padded, photo_weights=weights, grades=rows.grades)


def _summed(rows: IntArray) -> IntArray:
    return np.asarray(rows.sum(axis=0, dtype=np.int64), dtype=np.int64)
