"""Small models, items and recipes for tests of private training."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from fedgrade.items import ItemBatch, ItemPhotos
from fedgrade.model.compute import Compute
from fedgrade.model.networks import item_module
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, RESNET10T_GN_START_DIGEST, ModelSpec
from fedgrade.privacy.plan import exact
from fedgrade.training import SgdRecipe
from fedgrade.trust.records import PoissonGaussian

GRADES = 3
CLIP = 0.05
ADAPTER = ModelSpec(
    backbone="tf_efficientnet_lite0",
    input_size=64,
    pooling=("average",),
    weights_digest=LITE0_WEIGHTS_DIGEST,
    trainable="adapter",
    adapter_rank=4,
)
HEAD = replace(ADAPTER, trainable="head")
NORMS = replace(ADAPTER, trainable="norms")
NETWORK = ModelSpec(
    backbone="resnet10t_gn",
    input_size=64,
    pooling=("average",),
    weights_digest=RESNET10T_GN_START_DIGEST,
    trainable="network",
)
ON_FEATURES = [HEAD, ADAPTER]
ON_PHOTOS = [NORMS, NETWORK]


def noise(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def fresh(spec):
    """A module away from its start; at the start an adapter's gradients are mostly zero."""
    return item_module(
        spec,
        thresholds=noise(GRADES - 1, spec.feature_dimensions + 1, seed=1),
        centre=noise(spec.feature_dimensions, seed=2) * 0.01,
        change=(noise(spec.network_parameters, seed=3) * (0.1 if spec.on_features else 0.01)).astype(np.float32),
    )


def recipe(*, rate=1.0, deviation=1e-12, steps=1, learning_rate=1.0, declared_items=1, clip=CLIP):
    mechanism = PoissonGaussian(
        sampling_rate=exact(rate), noise_multiplier=exact(deviation), steps=steps, planned_steps=steps
    )
    return SgdRecipe(
        mechanism=mechanism, max_grad_norm=clip, learning_rate=learning_rate, declared_items=declared_items
    )


def feature_items(counts=(1, 3, 2, 1), *, size=1.0):
    """Items of so many photos each, as features."""
    inputs, weights = np.zeros((len(counts), max(counts), 1281)), np.zeros((len(counts), max(counts)))
    for item, count in enumerate(counts):
        inputs[item, :count] = noise(count, 1281, seed=10 + item) / 36 * size
        weights[item, :count] = 1 / count
    return ItemBatch(inputs=inputs, photo_weights=weights, grades=np.arange(len(counts)) % GRADES)


def photo_items(counts=(1, 3, 2), *, views=("upright",), photos=None):
    """Items of so many photos each, as photos."""
    ends = np.cumsum(counts)
    pixels = noise(sum(counts), 3, 64, 64, seed=20).astype(np.float32) if photos is None else photos
    return ItemPhotos(
        opened=lambda numbers: pixels[numbers],
        photos=tuple(np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)),
        grades=np.arange(len(counts)) % GRADES,
        views=views,
        compute=Compute(device="cpu", threads=1),
    )
