"""What must hold of the code that trains, charges and sends, each as one function that asserts it on the real path.

The ordinary tests call them on the code as it is; the mutants are judged by the same functions.
"""

import hashlib
from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import torch

from fedgrade.errors import ModelRefused, PlanRefused
from fedgrade.federation.canaries import CanaryTrial, audit_job, canary_scores
from fedgrade.federation.messages import Admitted, Contribution, Refusal
from fedgrade.federation.payloads import Head
from fedgrade.federation.releases import SiteRows, _item_photos, _sgd_update, gradient_sum
from fedgrade.full_batch import clipped_gradient_sum
from fedgrade.items import ItemBatch
from fedgrade.job import plan_job
from fedgrade.model.networks import PhotoLinear, item_module
from fedgrade.model.pooling import PooledBackbone
from fedgrade.privacy import audit
from fedgrade.privacy.plan import TRAIN_GRID_BITS, DistributedSpec
from fedgrade.training import SgdRecipe, train_by_sgd
from fedgrade.trust.records import DiscreteGaussian, PoissonGaussian
from tests.federation.small_federation import (
    DECLARED,
    LOCAL_SGD,
    NAMES,
    POLICY,
    SPEC,
    ProjectedPhotos,
    SmallFederation,
    ask,
    with_privacy,
)

SITE = NAMES[0]
FAULT = "photo 7 of item 3"
ROUNDS, CANARIES = 4, 300
FEATURES = 4  # of a head's input, in the checks of local_sgd
CLIP, LEARNING_RATE = 0.5, 0.1
NORMS = replace(SPEC.model, trainable="norms", input_size=64)
MECHANISM = DiscreteGaussian(sensitivity=2**TRAIN_GRID_BITS, scale=1)


@cache
def trial():
    """Four rounds whose noise is small enough for a few hundred canaries to see what is wrong."""
    return CanaryTrial(job=audit_job(epsilon=16.0, rounds=ROUNDS), purpose="train", canaries=CANARIES)


# What leaves a site in the integer modes.


def noise_is_as_large_as_charged(place):
    del place
    check = audit.deviation_check(canary_scores(trial()))
    assert check.passed, check


def presence_moves_the_sum_as_far_as_charged(place):
    del place
    check = audit.shift_check(canary_scores(trial()), trial().claim)
    assert check.passed, check


def one_item_moves_the_sum_by_at_most_the_sensitivity(place):
    """Whatever the item: ten photos, huge features, not a number; at a head that is wrong about every one of them."""
    del place
    job, rng = trial().job, np.random.default_rng(0)
    thresholds, inputs = job.head_shape()
    head = Head(thresholds=np.full((thresholds, inputs), 10.0), centre=np.zeros(inputs - 1))
    others = np.abs(rng.normal(size=(4, inputs - 1)))
    base = gradient_sum(job, head, _rows(others, photos=[1, 2, 1]), MECHANISM)
    same_photo = np.tile(others[:1], (10, 1))
    for added in (same_photo, 1e300 * same_photo, np.where(same_photo > 1, np.nan, same_photo)):
        rows = _rows(np.concatenate([others, added]), photos=[1, 2, 1, 10])
        moved = gradient_sum(job, head, rows, MECHANISM) - base
        assert sum(int(entry) ** 2 for entry in moved) <= MECHANISM.sensitivity**2


def a_long_gradient_is_shortened_to_the_clip_and_keeps_its_direction(place):
    """With a second item beside it, half as long: what one of them becomes must not depend on the other."""
    del place
    long = np.array([300.0, 400.0, 0.0, 0.0])
    batch = _batch(np.stack([long, long / 2, np.array([0.0, 0.0, 0.3, 0.4])]))
    total = clipped_gradient_sum(np.zeros((1, FEATURES)), batch, max_grad_norm=1.0, mechanism=MECHANISM)
    # At a head of zero the gradient is half the input: two items at the clip, one of length 1/4 below it.
    np.testing.assert_allclose(total / MECHANISM.sensitivity, [1.2, 1.6, 0.15, 0.2], rtol=1e-4)


def _rows(features, *, photos):
    return SiteRows(
        features=features,
        item_index=np.repeat(np.arange(len(photos)), photos),
        grades=np.zeros(len(photos), dtype=np.int64),
    )


# What leaves a site in local_sgd.


def every_step_adds_the_noise_that_is_charged_whatever_the_batch(place):
    """Items without a gradient, in batches that are mostly empty: the update is noise alone, of every step."""
    del place
    steps, noise, features = 50, Fraction(2), 400
    inputs = np.zeros((2, features))
    update = _update(inputs, _recipe(rate=Fraction(1, 20), noise=noise, steps=steps))
    promised = LEARNING_RATE * float(noise) * CLIP * np.sqrt(steps)  # the expected batch is one item
    scores = audit.CanaryScores(
        scores=update[:200] / promised, included=np.arange(200) < 100, idle=update[200:] / promised
    )
    check = audit.deviation_check(scores)
    assert check.passed, check


def one_item_moves_an_update_by_at_most_the_clip(place):
    del place
    inputs = np.array([[300.0, 400.0, 0.0, 0.0], [0.0, 0.0, np.nan, 1.0]])
    update = _update(inputs, _recipe(rate=Fraction(1), steps=1, items=1))
    assert np.linalg.norm(update) <= LEARNING_RATE * CLIP * 1.01, "the second item has no gradient to add"


def an_item_that_is_not_a_number_does_not_poison_an_update(place):
    del place
    inputs = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, np.nan, 1.0]])
    update = _update(inputs, _recipe(rate=Fraction(1), steps=1))
    assert np.linalg.norm(update) <= LEARNING_RATE * CLIP * 1.01, "the other item is all there is"


def batches_are_as_random_as_the_amplification_claims(place):
    """Batch sizes, read off updates of items that all pull the same way, are binomial: each item by its own coin."""
    del place
    items, rate, runs = 40, Fraction(1, 4), 200
    inputs = np.tile([100.0, 0.0, 0.0, 0.0], (items, 1))
    recipe = _recipe(rate=rate, steps=1, items=items)
    expected_batch = items * float(rate)
    sizes = np.array(
        [
            abs(_update(inputs, recipe)[0])
            for _ in range(runs)
        ]
    ) * (expected_batch / (LEARNING_RATE * CLIP))  # fmt: skip
    binomial = np.sqrt(expected_batch * (1 - float(rate)))
    assert abs(sizes.mean() - expected_batch) <= 5 * binomial / np.sqrt(runs)
    assert abs(sizes.std() / binomial - 1) <= 5 / np.sqrt(2 * runs)


def one_item_of_many_photos_moves_a_networks_update_by_at_most_the_clip(place):
    """As a site computes it, from rows to update; the noise is too little to matter."""
    del place
    job = plan_job(
        replace(LOCAL_SGD, model=NORMS), declared_items=dict.fromkeys(NAMES, DECLARED), nonce="photos of a network"
    )
    head = Head(
        thresholds=np.full(job.head_shape(), 10.0),
        centre=np.zeros(NORMS.feature_dimensions),
        network=np.zeros(NORMS.network_parameters, dtype=np.float32),
    )
    mechanism = replace(job.plan.train, sampling_rate=Fraction(1), noise_multiplier=Fraction(1, 10**6), steps=1)
    update = _sgd_update(job, head, _photo_rows(photos=[1, 4]), mechanism, site=SITE)
    item = job.spec.privacy.learning_rate * job.plan.max_grad_norm / DECLARED
    assert np.linalg.norm(update) <= 2 * item * 1.01, "there are two items"


def training_norms_leaves_their_statistics_alone(place):
    """The product looks for itself and refuses; here, that it had nothing to refuse."""
    del place
    try:
        train_by_sgd(_norms(), _item_photos(_photo_rows(photos=[1, 1]), NORMS), _recipe(rate=Fraction(1), steps=1))
    except ModelRefused as refused:
        raise AssertionError(str(refused)) from refused


def _norms():
    thresholds, centre = np.full((1, NORMS.feature_dimensions + 1), 10.0), np.zeros(NORMS.feature_dimensions)
    change = np.zeros(NORMS.network_parameters, dtype=np.float32)
    return item_module(NORMS, thresholds=thresholds, centre=centre, change=change)


def _photo_rows(*, photos):
    pixels = np.random.default_rng(0).normal(size=(sum(photos), 3, NORMS.input_size, NORMS.input_size))
    return replace(
        _rows(np.zeros((sum(photos), NORMS.feature_dimensions)), photos=photos),
        opened=lambda numbers: pixels[numbers].astype(np.float32),
    )


def _update(inputs, recipe):
    """The change of a head of one threshold that starts at zero."""
    return train_by_sgd(PhotoLinear(np.zeros((1, inputs.shape[1]))), _batch(inputs), recipe)


def _batch(inputs):
    return ItemBatch(
        inputs=inputs[:, None, :], photo_weights=np.ones((len(inputs), 1)), grades=np.zeros(len(inputs), dtype=np.int64)
    )


def _recipe(*, rate, steps, noise=Fraction(1, 10**6), items=1):
    mechanism = PoissonGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps, planned_steps=steps)
    return SgdRecipe(mechanism=mechanism, max_grad_norm=CLIP, learning_rate=LEARNING_RATE, declared_items=items)


# What the frozen network may keep of photos.


def photos_leave_no_trace_in_the_backbone(place):
    del place
    backbone = PooledBackbone(_BatchNormed(), ("average",))
    before = _buffers(backbone)
    backbone.train()
    backbone(torch.rand(6, 3, 4, 4))
    assert _buffers(backbone) == before


class _BatchNormed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward_features(self, photos):
        return self.norm(photos)


def _buffers(module):
    return {name: hashlib.sha256(buffer.numpy().tobytes()).hexdigest() for name, buffer in module.named_buffers()}


# What is charged, and when.


def charges_add_up_over_rounds_jobs_and_restarts(place):
    federation = SmallFederation.create(place)
    policy = replace(POLICY, epsilon_limit=60.0)
    first, second = federation.job(nonce="1"), federation.job(nonce="2")
    with federation.site(policy=policy) as site:
        site.answer(federation.admission(first))
        for question in (ask("centre"), ask("train", 0), ask("train", 1)):
            assert isinstance(_told(federation, site, federation.question(first, question)), Contribution)
    with federation.site(policy=policy) as site:
        told = _told(federation, site, federation.admission(second))
    assert isinstance(told, Refusal), "two jobs of epsilon 40 were admitted under a ceiling of 60"
    assert told.code == "budget"


def a_request_asked_twice_gets_the_same_bytes(place):
    federation = SmallFederation.create(place)
    job = federation.job()
    with federation.site() as site:
        site.answer(federation.admission(job))
        question = federation.question(job, ask("centre"))
        assert site.answer(question) == site.answer(question)
    assert len(federation.charges(SITE)) == 1


def photos_are_read_after_the_charge_is_on_disk(place):
    federation = SmallFederation.create(place)
    job, photos = federation.job(), _Watched(federation)
    with federation.site(photos=photos) as site:
        site.answer(federation.admission(job))
        photos.charges.clear()
        told = _told(federation, site, federation.question(job, ask("train")))
    assert isinstance(told, Contribution), "the site does not work at all"
    assert photos.charges == [1], f"photos were read when the ledger had {photos.charges} charges"


def a_share_of_noise_leaves_only_under_a_secure_sum(place):
    federation = SmallFederation.create(place)
    privacy = DistributedSpec(
        target_epsilon=10.0, floor_epsilon=40.0, delta=1e-5, evaluation_epsilon=10.0, centre_share=0.2, rounds=1,
        max_grad_norm=1.0,
    )  # fmt: skip
    aggregation = replace(SPEC.aggregation, minimum_sites=3, method="secure_sum")
    job = federation.job(replace(SPEC, privacy=privacy, aggregation=aggregation))
    alone = federation.job(with_privacy(target_epsilon=10.0, rounds=1))
    assert job.plan.train.scale < alone.plan.train.scale, "a share is less noise than the whole"
    with federation.site(policy=replace(POLICY, modes=("local", "distributed"))) as site:
        assert isinstance(_told(federation, site, federation.admission(job)), Admitted)
        told = _told(federation, site, federation.question(job, ask("centre")))
    assert isinstance(told, Refusal), "a release with a share of the noise left as it is"


def why_a_release_failed_stays_at_the_site(place):
    federation = SmallFederation.create(place)
    job, photos = federation.job(), _Failing(federation)
    with federation.site(photos=photos) as site:
        site.answer(federation.admission(job))
        for error in (ModelRefused(FAULT), PlanRefused(FAULT), ValueError(FAULT)):
            photos.error = error
            told = _told(federation, site, federation.question(job, ask("train", attempt=len(photos.raised))))
            assert isinstance(told, Refusal)
            assert FAULT not in told.reason, f"{type(error).__name__} told the coordinator what it was about"
            assert told.code in {"data", "malformed"}
    assert photos.raised == ["ModelRefused", "PlanRefused", "ValueError"], "each while computing"


class _Failing:
    """Photos from which no features come."""

    def __init__(self, federation):
        self._photos = ProjectedPhotos(root=federation.folder(SITE) / "photos")
        self.error = None
        self.raised = []

    def prepare(self, model, photos):
        self._photos.prepare(model, photos)

    @property
    def compute(self):
        return self._photos.compute

    def features(self, model, photos, view):
        del model, photos, view
        self.raised.append(type(self.error).__name__)
        raise self.error


class _Watched:
    """Photos that write down how many charges stood in the ledger each time they were read."""

    def __init__(self, federation):
        self._federation = federation
        self._photos = ProjectedPhotos(root=federation.folder(SITE) / "photos")
        self.charges = []

    def prepare(self, model, photos):
        self._photos.prepare(model, photos)

    @property
    def compute(self):
        return self._photos.compute

    def features(self, model, photos, view):
        self.charges.append(len(self._federation.charges(SITE)))
        return self._photos.features(model, photos, view)


def _told(federation, site, message):
    return federation.opened(site.answer(message)).document.body
