import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgrade.errors import DataRefused, ModelRefused
from fedgrade.model.head import (
    BIAS_FEATURE,
    grade_probabilities,
    head_inputs,
    item_mean,
    ordinal_gradient,
    ordinal_loss,
    unit_features,
)

any_float = st.floats(allow_nan=True, allow_infinity=True, width=64)


def matrices(elements=any_float, columns=5):
    return st.integers(0, 6).flatmap(lambda rows: arrays.arrays(np.float64, (rows, columns), elements=elements))


def problem(seed=0, photos=7, dimensions=5, grades=4):
    rng = np.random.default_rng(seed)
    inputs = head_inputs(rng.normal(size=(photos, dimensions)), rng.normal(size=dimensions) * 0.1)
    return rng.normal(size=(grades - 1, dimensions + 1)), inputs, rng.integers(0, grades, photos)


@given(matrices())
def test_unit_features_are_one_long_or_zero_whatever_comes_in(features):
    lengths = np.linalg.norm(unit_features(features), axis=1)
    usable = np.isfinite(features).all(axis=1) & features.any(axis=1)
    np.testing.assert_allclose(lengths, usable.astype(float), atol=1e-12)


@given(matrices(), arrays.arrays(np.float64, 5, elements=st.floats(-1, 1)))
def test_head_inputs_are_finite_and_never_longer_than_their_bound(features, centre):
    inputs = head_inputs(features, centre)
    assert np.isfinite(inputs).all()
    assert (inputs[:, -1] == BIAS_FEATURE).all()
    assert (np.linalg.norm(inputs, axis=1) <= np.sqrt(1 + BIAS_FEATURE**2) * (1 + 1e-12)).all()


@given(st.floats(1e-300, 1e300))
def test_brightness_of_the_features_does_not_matter(scale):
    features, centre = np.array([[3.0, 4.0, 0.0]]), np.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(head_inputs(features * scale, centre), head_inputs(features, centre), atol=1e-12)


def test_head_inputs_by_hand():
    inputs = head_inputs(np.array([[3.0, 4.0]], dtype=np.float32), np.array([0.6, 0.0]))
    np.testing.assert_allclose(inputs, [[0.0, 1.0, 0.3]], atol=1e-12)


def test_a_photo_without_usable_features_keeps_the_bias_alone():
    features = np.array([[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
    np.testing.assert_array_equal(head_inputs(features, np.array([0.5, 0.5])), [[0, 0, BIAS_FEATURE]] * 3)


@pytest.mark.parametrize("centre", [np.zeros(4), np.zeros((1, 5)), np.full(5, np.nan)])
def test_a_centre_that_does_not_fit_is_refused(centre):
    with pytest.raises(ModelRefused, match="centre"):
        head_inputs(np.ones((2, 5)), centre)


@given(matrices(st.floats(-1e6, 1e6), 6), arrays.arrays(np.float64, (3, 6), elements=st.floats(-1e6, 1e6)))
def test_probabilities_are_never_negative_and_sum_to_one(inputs, thresholds):
    probabilities = grade_probabilities(thresholds, inputs)
    assert probabilities.shape == (len(inputs), 4)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-12)


def test_probabilities_by_hand():
    scores = np.log([[3.0], [1.0], [1 / 3]])
    np.testing.assert_allclose(grade_probabilities(scores, np.ones((1, 1))), [[0.25, 0.25, 0.25, 0.25]])


def test_thresholds_that_cross_are_made_to_fall():
    scores = np.log([[1.0], [3.0], [1 / 3]])
    np.testing.assert_allclose(grade_probabilities(scores, np.ones((1, 1))), [[0.5, 0.0, 0.25, 0.25]])


def test_thresholds_of_another_width_are_refused():
    with pytest.raises(ModelRefused, match="do not fit"):
        grade_probabilities(np.zeros((3, 4)), np.zeros((2, 5)))


def test_an_untrained_head_is_undecided_at_every_threshold():
    _, inputs, grades = problem()
    thresholds = np.zeros((3, inputs.shape[1]))
    np.testing.assert_allclose(ordinal_loss(thresholds, inputs, grades), 3 * np.log(2))
    np.testing.assert_allclose(grade_probabilities(thresholds, inputs), [[0.5, 0.0, 0.0, 0.5]] * 7)


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_in_closed_form_is_the_slope_of_the_loss(seed):
    thresholds, inputs, grades = problem(seed)
    gradient = ordinal_gradient(thresholds, inputs, grades)
    step = 1e-6
    for index in np.ndindex(thresholds.shape):
        nudge = np.zeros_like(thresholds)
        nudge[index] = step
        higher, lower = (ordinal_loss(thresholds + sign * nudge, inputs, grades) for sign in (1, -1))
        np.testing.assert_allclose(gradient[:, *index], (higher - lower) / (2 * step), atol=1e-8)


def test_the_loss_and_its_gradient_agree_with_torch():
    torch = pytest.importorskip("torch")
    thresholds, inputs, grades = problem(9)
    weights = torch.tensor(thresholds, requires_grad=True)
    targets = torch.tensor((grades[:, None] > np.arange(3)).astype(float))
    scores = torch.tensor(inputs) @ weights.T
    losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="none").sum(1)
    np.testing.assert_allclose(losses.detach().numpy(), ordinal_loss(thresholds, inputs, grades), atol=1e-12)
    (slope,) = torch.autograd.grad(losses.sum(), weights)
    np.testing.assert_allclose(slope.numpy(), ordinal_gradient(thresholds, inputs, grades).sum(0), atol=1e-12)


def test_the_loss_of_a_huge_score_does_not_overflow():
    loss = ordinal_loss(np.array([[1e6]]), np.ones((2, 1)), np.array([0, 1]))
    np.testing.assert_array_equal(loss, [1e6, 0.0])


def test_the_mean_of_an_items_photos_by_hand():
    rows = np.array([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0]])
    np.testing.assert_array_equal(item_mean(rows, np.array([0, 1, 0]), 2), [[2.0, 3.0], [10.0, 20.0]])


@given(st.permutations(range(6)))
def test_the_order_of_the_photos_does_not_change_an_items_mean(order):
    rows, item_index = np.arange(12.0).reshape(6, 2), np.array([0, 0, 0, 1, 1, 2])
    turned = item_mean(rows[list(order)], item_index[list(order)], 3)
    np.testing.assert_allclose(turned, item_mean(rows, item_index, 3))


def test_a_photo_repeated_within_an_item_does_not_move_its_gradient():
    thresholds, inputs, grades = problem(photos=1)
    once = ordinal_gradient(thresholds, inputs, grades)
    thrice = ordinal_gradient(thresholds, np.repeat(inputs, 3, axis=0), np.repeat(grades, 3))
    np.testing.assert_allclose(item_mean(thrice, np.zeros(3, dtype=np.int64), 1), once)


def test_no_items_have_no_means():
    assert item_mean(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), 0).shape == (0, 4)


@pytest.mark.parametrize(("item_index", "items"), [([0, 2], 2), ([-1, 0], 2), ([0, 0, 0], 1), ([0, 0], 2)])
def test_an_index_that_does_not_fit_is_refused(item_index, items):
    with pytest.raises(DataRefused, match="item"):
        item_mean(np.zeros((2, 1)), np.array(item_index), items)


def test_the_head_and_the_spec_need_neither_torch_nor_timm():
    code = (
        "import sys; from fedgrade.model import head, spec, weights;"
        "assert not {'torch', 'timm', 'onnxruntime', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
