"""What a site computes from its items once it may: the arrays of one release, and nothing that decides whether.

Every function here takes rows that are sensitive and returns bytes that may leave, or raises. No ledger, no policy, no
network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import numpy as np
import numpy.typing as npt

from fedgrade.data.manifest import Item, Split
from fedgrade.errors import JobRefused, ModelRefused
from fedgrade.evaluation import item_rows
from fedgrade.federation.holdings import PhotoFeatures
from fedgrade.federation.payloads import Head, release_size, write_release, write_update
from fedgrade.full_batch import clipped_gradient_sum
from fedgrade.grading import decide
from fedgrade.items import PHOTOS_AT_ONCE, ItemBatch, ItemPhotos
from fedgrade.job import TrainingJob
from fedgrade.model.adapter import graded_inputs
from fedgrade.model.compute import Compute
from fedgrade.model.head import grade_probabilities, head_inputs, item_mean, unit_features
from fedgrade.model.networks import TrainedExtractor, item_module
from fedgrade.model.preprocessing import FeatureArray
from fedgrade.model.spec import ModelSpec
from fedgrade.privacy.grid import add_noise, grid_rows
from fedgrade.privacy.noise import discrete_gaussian
from fedgrade.privacy.plan import LocalSgdSpec
from fedgrade.training import SgdRecipe, train_by_sgd
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import DiscreteGaussian, PoissonGaussian, Purpose

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def _no_photos(numbers: IntArray) -> FeatureArray:
    raise ModelRefused(f"rows: {len(numbers)} photos are wanted, and there are features alone")


@dataclass(frozen=True, kw_only=True)
class SiteRows:
    """One side of a site's data as numbers: sensitive, never stored or sent.

    Attributes:
        features: [photos, dimensions] of the upright photos.
        item_index: [photos], the item each photo shows, counted from 0; an item's photos stand together.
        grades: [items], positions on the scale.
        turned: [photos, dimensions] for each further view of the same photos; training alone looks at them.
        opened: network inputs [photos, 3, input, input] of upright photos by their numbers, where a network is trained.
        compute: what networks run on.
        batches: what the head sees of the training items, by the centre it was made for; rounds share one centre.
    """

    features: FloatArray
    item_index: IntArray
    grades: IntArray
    turned: tuple[FloatArray, ...] = ()
    opened: Callable[[IntArray], FeatureArray] = _no_photos
    compute: Compute = field(default_factory=lambda: Compute(device="cpu", threads=1))
    batches: dict[bytes, ItemBatch] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "SiteRows(<sensitive>)"

    @property
    def items(self) -> int:
        """How many items there are."""
        return len(self.grades)


def load_rows(source: PhotoFeatures, model: ModelSpec, items: Sequence[Item], split: Split) -> SiteRows:
    """The rows of ``items``, all of one ``split``: every view that training looks at, or the upright one."""
    photos = [photo for item in items for photo in item.photos]
    views = model.views if split is Split.TRAIN and model.on_features else model.views[:1]
    upright, *turned = (source.features(model, photos, view).astype(np.float64) for view in views)
    return SiteRows(
        features=upright,
        item_index=np.repeat(np.arange(len(items)), [len(item.photos) for item in items]),
        grades=np.array([item.grade for item in items], dtype=np.int64),
        turned=tuple(turned),
        opened=lambda numbers: source.inputs(model, [photos[number] for number in numbers]),
        compute=source.compute,
    )


def compute_release(
    job: TrainingJob, purpose: Purpose, head: Head, *, site: SiteId, rows: Callable[[Split], SiteRows]
) -> bytes:
    """The arrays of one release as safetensors: ``release`` (noisy integers) or, for DP-SGD, ``update``.

    Guarantee: costs exactly ``job.plan.mechanism(purpose)``. Integer noise is drawn before ``rows`` is first called;
    that of DP-SGD goes with its steps.
    """
    mechanism = job.plan.mechanism(purpose)
    if isinstance(mechanism, PoissonGaussian):
        return write_update(job, _sgd_update(job, head, rows(Split.TRAIN), mechanism, site=site))
    return write_release(noisy_sum(job, purpose, head, rows=rows))


def noisy_sum(job: TrainingJob, purpose: Purpose, head: Head, *, rows: Callable[[Split], SiteRows]) -> IntArray:
    """The integers [numbers] of one release in a full-batch mode.

    Guarantee: costs exactly ``job.plan.mechanism(purpose)``. Noise is drawn before ``rows`` is first called.

    Raises:
        JobRefused: the release is no sum of integers.
    """
    mechanism = job.plan.mechanism(purpose)
    if isinstance(mechanism, PoissonGaussian):
        raise JobRefused(f"{purpose}: a {mechanism.kind} release is no sum of integers")
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
    return add_noise(total, noise=noise)


def feature_sum(rows: SiteRows, mechanism: DiscreteGaussian) -> IntArray:
    """Sum [dimensions] over items of their mean unit features, on the grid."""
    means = item_mean(unit_features(rows.features), rows.item_index, rows.items)
    return _summed(grid_rows(means, max_norm=1.0, mechanism=mechanism))


def gradient_sum(job: TrainingJob, head: Head, rows: SiteRows, mechanism: DiscreteGaussian) -> IntArray:
    """Sum over items of their clipped gradients [thresholds * inputs], on the grid."""
    batch = _item_batch(rows, head.centre)
    return clipped_gradient_sum(head.thresholds, batch, max_grad_norm=job.plan.max_grad_norm, mechanism=mechanism)


def confusion_sum(job: TrainingJob, head: Head, rows: SiteRows, mechanism: DiscreteGaussian) -> IntArray:
    """Confusion counts [grades * grades] of the head's cheapest decisions, on the grid.

    Guarantee: what is decided about an item depends on that item alone, to the last bit: with one item more or less,
    no near tie of another falls the other way.
    """
    scale, model = job.spec.grading, job.spec.model
    features = rows.features if model.on_features else _network_features(model, head, rows)
    inputs = graded_inputs(model, features, centre=head.centre, change=head.network)
    means = item_mean(grade_probabilities(head.thresholds, inputs), rows.item_index, rows.items)
    # One by one: the expected costs of many items are a matrix product.
    decided = np.array([decide(means[item : item + 1], scale)[0] for item in range(rows.items)], dtype=np.int64)
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
    model = job.spec.model
    module = item_module(model, thresholds=head.thresholds, centre=head.centre, change=head.network)
    items = _item_batch(rows, head.centre) if model.on_features else _item_photos(rows, model)
    return train_by_sgd(module, items, recipe)


def _item_photos(rows: SiteRows, model: ModelSpec) -> ItemPhotos:
    photos = np.bincount(rows.item_index, minlength=rows.items)
    ends, numbers = np.cumsum(photos), np.arange(len(rows.item_index))
    return ItemPhotos(
        opened=rows.opened,
        photos=tuple(numbers[end - count : end] for end, count in zip(ends, photos, strict=True)),
        grades=rows.grades,
        views=model.views,
        compute=rows.compute,
    )


def _network_features(model: ModelSpec, head: Head, rows: SiteRows) -> FloatArray:
    """Features [photos, dimensions] by the network as it now is; a few photos are open at once."""
    extractor, numbers = TrainedExtractor(model, head.network, compute=rows.compute), np.arange(len(rows.item_index))
    features = np.empty((len(numbers), extractor.dimensions))
    for start in range(0, len(numbers), PHOTOS_AT_ONCE):
        here = slice(start, start + PHOTOS_AT_ONCE)
        features[here] = extractor.extract(rows.opened(numbers[here]))
    return features


def _item_batch(rows: SiteRows, centre: FloatArray) -> ItemBatch:
    """The items as the head sees them around ``centre``; made once for all rounds that share it."""
    key = centre.tobytes()
    if key not in rows.batches:
        rows.batches.clear()
        rows.batches[key] = _padded(rows, centre)
    return rows.batches[key]


def _padded(rows: SiteRows, centre: FloatArray) -> ItemBatch:
    """Items' photos and views side by side, padded with photos of weight zero to the item with most."""
    shown = np.tile(rows.item_index, 1 + len(rows.turned))
    order = np.argsort(shown, kind="stable")
    inputs = head_inputs(np.concatenate([rows.features, *rows.turned])[order], centre)
    shown, photos = shown[order], np.bincount(shown, minlength=rows.items)
    most = int(photos.max(initial=1))
    position = np.arange(len(inputs)) - np.repeat(np.cumsum(photos) - photos, photos)
    padded = np.zeros((rows.items, most, inputs.shape[1]))
    padded[shown, position] = inputs
    weights = np.where(np.arange(most) < photos[:, None], 1.0 / np.maximum(photos, 1)[:, None], 0.0)
    return ItemBatch(inputs=padded, photo_weights=weights, grades=rows.grades)


def _summed(rows: IntArray) -> IntArray:
    return np.asarray(rows.sum(axis=0, dtype=np.int64), dtype=np.int64)
