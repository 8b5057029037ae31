"""What a site computes from its items: decisions of single items, views, and networks' features."""

from dataclasses import replace

import numpy as np
import pytest

from fedgrade.data.manifest import Split, read_manifest
from fedgrade.federation.payloads import Head
from fedgrade.federation.releases import SiteRows, _padded, confusion_sum, feature_sum, gradient_sum, load_rows
from fedgrade.grading import decide
from fedgrade.job import TrainingJob, plan_job
from fedgrade.model.head import grade_probabilities, head_inputs, scores
from fedgrade.privacy.plan import TRAIN_GRID_BITS
from fedgrade.trust.records import DiscreteGaussian
from tests.federation.small_federation import (
    DECLARED,
    NAMES,
    SPEC,
    ProjectedPhotos,
    SmallFederation,
    calibrate_once,
)

MECHANISM = DiscreteGaussian(sensitivity=2**20, scale=1)
TRAINING = DiscreteGaussian(sensitivity=2**TRAIN_GRID_BITS, scale=1)
FOUR_VIEWS = ("upright", "flip_horizontal", "flip_vertical", "rotate_180")
DIMENSIONS = SPEC.model.feature_dimensions


@pytest.fixture(autouse=True)
def _solved_once(monkeypatch):
    monkeypatch.setattr("fedgrade.job.calibrate", calibrate_once)


def job_of(**model) -> TrainingJob:
    spec = replace(SPEC, model=replace(SPEC.model, **model))
    return plan_job(spec, declared_items=dict.fromkeys(NAMES, DECLARED), nonce="0")


def rows_of(features, counts, grades, *, turned=()):
    return SiteRows(
        features=features, item_index=np.repeat(np.arange(len(counts)), counts), grades=np.array(grades), turned=turned
    )


def head_of(job, seed=0):
    rng = np.random.default_rng(seed)
    return Head(thresholds=rng.normal(size=job.head_shape()), centre=rng.normal(size=DIMENSIONS) * 0.01)


def decided(job, head, rows):
    """The counts of a release before its noise, as whole items."""
    cells = confusion_sum(job, head, rows, MECHANISM).reshape(SPEC.grading.grades, -1)
    return np.round(cells / MECHANISM.sensitivity).astype(int)


NEIGHBOURS = 60


def decided_by(multiplied, head, inputs):
    """Grades [photos] by scores that ``multiplied`` makes of inputs and weights."""
    return decide(grade_probabilities(np.eye(2), multiplied(inputs, head.thresholds.T)), SPEC.grading)


def near_tie(inputs, rng):
    """A head for which selling the item of ``inputs`` as B or as C costs the same, but for last bits.

    Both thresholds alike leave A with 2/3 and C with 1/3: B costs 2/3 + 2 * 1/3, C costs 2 * 2/3.
    """
    direction = rng.normal(size=DIMENSIONS + 1)
    for _ in range(3):
        direction[-1] += (np.log(0.5) - scores(direction[None], inputs[None])[0, 0]) / inputs[-1]
    return Head(thresholds=np.stack([direction, direction]), centre=np.zeros(DIMENSIONS))


def near_ties():
    rng = np.random.default_rng(1)
    features = np.abs(rng.normal(size=(NEIGHBOURS, DIMENSIONS)))
    inputs = head_inputs(features, np.zeros(DIMENSIONS))
    return features, inputs, [near_tie(row, rng) for row in inputs]


def test_no_neighbour_flips_a_near_tie():
    """Each item an ulp from a border, alone and among neighbours: what is decided about it is the same."""
    job, (features, _, heads) = job_of(), near_ties()
    for item, head in enumerate(heads):
        others = np.arange(NEIGHBOURS) != item
        alone = decided(job, head, rows_of(features[[item]], [1], [0]))
        among = decided(job, head, rows_of(features, [1] * NEIGHBOURS, [0] * NEIGHBOURS))
        rest = decided(job, head, rows_of(features[others], [1] * (NEIGHBOURS - 1), [0] * (NEIGHBOURS - 1)))
        np.testing.assert_array_equal(among - rest, alone)


def test_in_a_matrix_product_neighbours_do_flip_near_ties():
    _, inputs, heads = near_ties()
    flipped = sum(
        decided_by(np.matmul, head, inputs)[item] != decided_by(np.matmul, head, inputs[[item]])[0]
        for item, head in enumerate(heads)
    )
    assert flipped > 0


def test_one_item_more_adds_one_decision_and_changes_none():
    job, rng = job_of(), np.random.default_rng(2)
    features, counts, grades = rng.normal(size=(9, DIMENSIONS)), [2, 1, 3, 1, 2], [0, 1, 2, 1, 0]
    head = head_of(job)
    whole = decided(job, head, rows_of(features, counts, grades))
    rest = decided(job, head, rows_of(features[:-2], counts[:-1], grades[:-1]))
    assert sorted((whole - rest).ravel()) == [0] * 8 + [1]


def test_a_views_gradient_is_averaged_into_its_items_before_the_clip():
    job, rng = job_of(views=("upright", "rotate_180")), np.random.default_rng(3)
    upright, turned, counts = rng.normal(size=(4, DIMENSIONS)), rng.normal(size=(4, DIMENSIONS)), [1, 3]
    head = head_of(job)
    with_views = rows_of(upright, counts, [2, 0], turned=(turned,))
    # The same items, their views as photos of their own: what an item teaches is the mean over both.
    as_photos = np.concatenate([upright[:1], turned[:1], upright[1:], turned[1:]])
    expected = gradient_sum(job, head, rows_of(as_photos, [2, 6], [2, 0]), TRAINING)
    np.testing.assert_array_equal(gradient_sum(job, head, with_views, TRAINING), expected)
    batch = _padded(with_views, head.centre)
    np.testing.assert_allclose(batch.photo_weights.sum(axis=1), 1.0)
    assert batch.photo_weights.shape == (2, 6)


def test_with_views_one_item_still_moves_the_sum_by_at_most_the_sensitivity():
    job, rng = job_of(views=FOUR_VIEWS), np.random.default_rng(4)
    shown = rng.normal(size=(4, 6, DIMENSIONS)) * 100
    head = replace(head_of(job), thresholds=np.full(job.head_shape(), 10.0))
    whole = rows_of(shown[0], [1, 5], [0, 2], turned=tuple(shown[1:]))
    rest = rows_of(shown[0, :1], [1], [0], turned=tuple(view[:1] for view in shown[1:]))
    moved = gradient_sum(job, head, whole, TRAINING) - gradient_sum(job, head, rest, TRAINING)
    assert 0 < sum(int(entry) ** 2 for entry in moved) <= TRAINING.sensitivity**2


def test_centre_and_evaluation_look_at_upright_photos_alone():
    job, rng = job_of(views=("upright", "rotate_180")), np.random.default_rng(5)
    features, turned = rng.normal(size=(2, 3, DIMENSIONS))
    plain, viewed = rows_of(features, [1, 2], [0, 1]), rows_of(features, [1, 2], [0, 1], turned=(turned,))
    np.testing.assert_array_equal(feature_sum(viewed, MECHANISM), feature_sum(plain, MECHANISM))
    np.testing.assert_array_equal(decided(job, head_of(job), viewed), decided(job, head_of(job), plain))


def test_rows_hold_every_view_of_training_photos_and_upright_test_photos(tmp_path):
    federation = SmallFederation.create(tmp_path, names=NAMES[:2])
    raw = (federation.folder(NAMES[0]) / "manifest.csv").read_bytes()
    manifest = read_manifest(raw, SPEC.grading)
    source, model = ProjectedPhotos(root=federation.folder(NAMES[0]) / "photos"), job_of(views=FOUR_VIEWS).spec.model
    train = load_rows(source, model, manifest.items(Split.TRAIN), Split.TRAIN)
    assert len(train.turned) == 3
    assert not any(np.array_equal(train.features, turned) for turned in train.turned)
    np.testing.assert_array_equal(train.opened(np.array([1, 0])).shape, (2, 3, model.input_size, model.input_size))
    assert load_rows(source, model, manifest.items(Split.TEST), Split.TEST).turned == ()
