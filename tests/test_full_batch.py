import hashlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from opacus import GradSampleModule
from torch.nn import functional

from fedgrade import full_batch
from fedgrade.errors import PlanRefused
from fedgrade.full_batch import clipped_gradient_sum
from fedgrade.items import ItemBatch
from fedgrade.model.networks import PhotoLinear
from fedgrade.privacy.fixed_point import FixedPointPhotos
from fedgrade.trust.records import DiscreteGaussian
from tests.few_items import GRADES, clipped_by_hand, closed_form_rows, padded, problem

GRID = 2**40
MECHANISM = DiscreteGaussian(sensitivity=GRID, scale=3)


def clipped_sum(thresholds, batch, *, max_grad_norm=1.0):
    return clipped_gradient_sum(thresholds, batch, max_grad_norm=max_grad_norm, mechanism=MECHANISM)


def squared_length(integers):
    """In Python's integers, which cannot overflow."""
    return sum(int(entry) ** 2 for entry in integers)


def precise_rows(thresholds, photos, grades):
    """Gradients [items, ...] of items' mean losses in extended precision: sigmoids by their definition, a photo a time.

    The second method: no integers, no rounding, nothing of the code that trains but the equation.
    """
    weights, rows = thresholds.astype(np.longdouble), []
    for shown, grade in zip(photos, grades, strict=True):
        inputs = shown.astype(np.longdouble)
        scores = (inputs[:, None, :] * weights).sum(axis=2)
        residuals = 1 / (1 + np.exp(-scores)) - (grade > np.arange(len(weights)))
        rows.append((residuals[:, :, None] * inputs[:, None, :]).mean(axis=0).ravel())
    return rows


def bound(thresholds, photos, max_grad_norm):
    """How far, in clips, all items' parts may be from their exact ones: what the rounding of each number adds up to.

    An input is off by half of 2^-20 of its photo's length. That moves a score by the threshold's length times the
    vector's error, and a residual by a quarter of it; residuals are off by another 2^-20 of the clip a photo, and an
    item at the clip is shortened by 2^-18 a photo and threshold.
    """
    features, shown = thresholds.shape[1], sum(map(len, photos))
    length = max(np.linalg.norm(rows, axis=1).max() for rows in photos)
    input_error = np.sqrt(features) / 2 * length * max(1.0, 1 / max_grad_norm)
    score_error = (np.linalg.norm(thresholds, axis=1) / 4).sum() * length
    return 2.0**-20 * (len(photos) * input_error * (len(thresholds) + score_error) + 6 * shown * len(thresholds))


def assert_close(found, rows, thresholds, photos, max_grad_norm):
    expected = sum(clipped_by_hand(row, max_grad_norm) for row in rows) / max_grad_norm
    apart = np.linalg.norm((found / GRID - expected).astype(np.float64))
    allowed = bound(thresholds, photos, max_grad_norm)
    assert apart <= allowed
    assert allowed < 0.2 * np.linalg.norm(expected.astype(np.float64)), "there is something to compare"


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.7, 100.0])
@pytest.mark.parametrize(("features", "most"), [(6, 4), (700, 1), (30, 12)])
def test_the_sum_is_that_of_items_clipped_one_by_one_in_extended_precision(max_grad_norm, features, most):
    thresholds, photos, batch = problem(600, features=features, most=most)
    rows = precise_rows(thresholds, photos, batch.grades)
    oracle = closed_form_rows(thresholds, photos, batch.grades)
    np.testing.assert_allclose(oracle, np.array(rows, dtype=np.float64), atol=1e-12)
    found = clipped_sum(thresholds, batch, max_grad_norm=max_grad_norm)
    assert_close(found, rows, thresholds, photos, max_grad_norm)


def test_a_real_heads_gradient_is_right_to_a_hundred_thousandth():
    thresholds, photos, batch = problem(300, seed=4, features=3840, most=1)
    rows = closed_form_rows(thresholds, photos, batch.grades)
    expected = sum(clipped_by_hand(row, 1.0) for row in rows)
    apart = np.linalg.norm(clipped_sum(thresholds, batch) / GRID - expected)
    assert apart < 1e-5 * np.linalg.norm(expected)


def test_the_sum_is_autograds_one_item_at_a_time():
    thresholds, photos, batch = problem(30, seed=1)
    rows = [autograd_row(thresholds, rows, grade) for rows, grade in zip(photos, batch.grades, strict=True)]
    np.testing.assert_allclose(rows, closed_form_rows(thresholds, photos, batch.grades), atol=1e-12)
    assert_close(clipped_sum(thresholds, batch, max_grad_norm=0.5), rows, thresholds, photos, 0.5)


def autograd_row(thresholds, rows, grade):
    weights = torch.from_numpy(thresholds).requires_grad_()
    scores = torch.from_numpy(rows) @ weights.T
    above = (torch.arange(len(thresholds)) < int(grade)).to(scores.dtype).expand_as(scores)
    loss = functional.binary_cross_entropy_with_logits(scores, above, reduction="none").sum(dim=1).mean()
    (gradient,) = torch.autograd.grad(loss, weights)
    return gradient.numpy().ravel()


def test_the_sum_is_that_of_opacus_per_sample_gradients():
    """The full-batch sum is a closed form; Opacus, which trains in mode local_sgd, is the second opinion on it."""
    thresholds, photos, batch = problem(30, seed=8)
    rows = opacus_rows(thresholds, batch)
    assert_close(clipped_sum(thresholds, batch, max_grad_norm=0.5), rows, thresholds, photos, 0.5)


def opacus_rows(thresholds, batch):
    """Gradients [items, ...] by Opacus' own hooks, which training does without."""
    module = GradSampleModule(PhotoLinear(thresholds), batch_first=True, loss_reduction="sum")
    scores = module(torch.from_numpy(batch.inputs).requires_grad_())
    above = torch.from_numpy(batch.grades[:, None] > np.arange(len(thresholds))).to(scores)[:, None].expand_as(scores)
    losses = functional.binary_cross_entropy_with_logits(scores, above, reduction="none").sum(dim=2)
    (losses * torch.from_numpy(batch.photo_weights)).sum().backward()
    return next(module.parameters()).grad_sample.reshape(len(batch), -1).numpy()


def test_an_item_with_ten_photos_counts_once():
    thresholds, photos, _ = problem(2, seed=2, most=1)
    once, ten_times = padded(photos, [3, 0]), padded([np.repeat(photos[0], 10, axis=0), photos[1]], [3, 0])
    apart = np.abs(clipped_sum(thresholds, once) - clipped_sum(thresholds, ten_times)).max()
    assert apart <= 2.0**-15 * GRID


def test_photos_are_averaged_before_the_item_is_clipped():
    # Opposite photos of one item: clipped apart they would leave something, averaged they leave nothing.
    there, back = np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])
    batch = padded([np.concatenate([there, back])], [1])
    assert clipped_sum(np.zeros((1, 2)), batch, max_grad_norm=0.1).tolist() == [0, 0]
    long = padded([np.concatenate([5 * there, back])], [1])
    first, second = clipped_sum(np.zeros((1, 2)), long, max_grad_norm=0.1)
    assert -GRID <= first < -GRID * (1 - 2.0**-15)
    assert second == 0


@pytest.mark.parametrize("items", [1, 63, 64, 65, 129, 4095, 4096, 4097])
def test_every_item_counts_once_wherever_the_chunks_end(items):
    # At thresholds of zero the residual is exactly a half, and half of the grid is 2^39 whole ones.
    photos = [np.eye(3)[[item % 3]] for item in range(items)]
    found = clipped_sum(np.zeros((1, 3)), padded(photos, [0] * items))
    assert found.tolist() == [2**39 * len(range(column, items, 3)) for column in range(3)]


@pytest.mark.parametrize(("items", "features", "most"), [(130, 40, 4), (9, 3840, 4), (70, 64, 30), (300, 64, 1)])
@pytest.mark.parametrize("max_grad_norm", [0.3, 1.0])
def test_an_items_part_of_the_sum_is_its_own_to_the_last_bit(items, features, most, max_grad_norm):
    """Alone or among others, in any order, however far it is padded: else one item more could move the others' rows."""
    thresholds, photos, batch = problem(items, seed=9, features=features, most=most)

    def total(shown, grades):
        return clipped_sum(thresholds, padded(shown, grades), max_grad_norm=max_grad_norm)

    whole = clipped_sum(thresholds, batch, max_grad_norm=max_grad_norm)
    alone = [total([rows], [grade]) for rows, grade in zip(photos, batch.grades, strict=True)]
    np.testing.assert_array_equal(sum(alone), whole)
    order = np.random.default_rng(0).permutation(items)
    np.testing.assert_array_equal(total([photos[item] for item in order], batch.grades[order]), whole)
    wide = np.concatenate([photos[0]] * 9)
    np.testing.assert_array_equal(total([*photos, wide], [*batch.grades, 2]) - total([wide], [2]), whole)
    np.testing.assert_array_equal(total(photos[1:], batch.grades[1:]) + alone[0], whole)


def test_the_number_of_threads_changes_no_bit():
    program = """
        import hashlib
        from fedgrade.full_batch import clipped_gradient_sum
        from fedgrade.trust.records import DiscreteGaussian
        from tests.few_items import problem
        thresholds, _, batch = problem(500, features=3840, most=2)
        mechanism = DiscreteGaussian(sensitivity=2**40, scale=3)
        total = clipped_gradient_sum(thresholds, batch, max_grad_norm=0.7, mechanism=mechanism)
        print(hashlib.sha256(total.tobytes()).hexdigest())
    """
    digests = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True, text=True, check=True,
            env={"PYTHONPATH": ":".join(sys.path), "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
        ).stdout
        for threads in ("1", "2")
    }  # fmt: skip
    thresholds, _, batch = problem(500, features=3840, most=2)
    here = clipped_sum(thresholds, batch, max_grad_norm=0.7)
    assert digests == {hashlib.sha256(here.tobytes()).hexdigest() + "\n"}


def test_no_items_sum_to_zero():
    empty = ItemBatch(inputs=np.zeros((0, 1, 7)), photo_weights=np.zeros((0, 1)), grades=np.zeros(0, dtype=np.int64))
    assert clipped_sum(np.ones((3, 7)), empty).tolist() == [0] * 21


hostile = st.sampled_from([0.0, np.nan, np.inf, -np.inf, 1e308, -1e308, 1e154, 5e-324, 1.0]) | st.floats(width=64)
hostile_batches = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda shape: st.builds(
        lambda inputs, grades: ItemBatch(
            inputs=inputs, photo_weights=np.full(inputs.shape[:2], 1 / inputs.shape[1]), grades=grades
        ),
        arrays.arrays(np.float64, shape, elements=hostile),
        arrays.arrays(np.int64, shape[:1], elements=st.integers(0, 2)),
    )
)
clips = st.sampled_from([1e-305, 1e-6, 1e-3, 1.0, 7.3, 1e6, 1e300])
weights = st.sampled_from([0.0, 1e6, -1e6, 1e-300, 1e300, np.nan, np.inf]) | st.floats(-1e3, 1e3)


@settings(max_examples=200)
@given(hostile_batches, clips, weights, st.data())
def test_one_item_more_or_less_moves_the_sum_by_at_most_the_sensitivity(batch, clip, weight, data):
    thresholds = np.full((2, batch.inputs.shape[2]), weight)
    left_out = data.draw(st.integers(0, len(batch) - 1))
    rest = batch.take(np.arange(len(batch)) != left_out)
    moved = clipped_sum(thresholds, batch, max_grad_norm=clip) - clipped_sum(thresholds, rest, max_grad_norm=clip)
    assert squared_length(moved) <= GRID**2


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 40), clips, st.floats(0.0, 1.0), st.sampled_from([1e-8, 0.3, 1.0, 1e8]))
def test_items_of_many_photos_that_all_but_cancel_stay_within_the_sensitivity(seed, photos, clip, turned, length):
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=5)
    signs = np.where(np.arange(photos) % 2, -1.0, 1.0)
    shown = length * (signs[:, None] * direction + turned * 1e-3 * rng.normal(size=(photos, 5)))
    one, others = padded([shown], [1]), problem(3, features=4)[1]
    thresholds = rng.normal(size=(GRADES - 1, 5))
    assert squared_length(clipped_sum(thresholds, one, max_grad_norm=clip)) <= GRID**2
    together = clipped_sum(thresholds, padded([*others, shown], [0, 1, 2, 1]), max_grad_norm=clip)
    moved = together - clipped_sum(thresholds, padded(others, [0, 1, 2]), max_grad_norm=clip)
    assert squared_length(moved) <= GRID**2


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_an_item_that_is_not_finite_counts_as_absent_and_spoils_no_other(poison):
    thresholds, photos, batch = problem(10, seed=3)
    spoilt = [rows.copy() for rows in photos]
    spoilt[4][-1, 2] = poison
    rest = padded([rows for item, rows in enumerate(photos) if item != 4], np.delete(batch.grades, 4))
    found = clipped_sum(thresholds, padded(spoilt, batch.grades))
    np.testing.assert_array_equal(found, clipped_sum(thresholds, rest))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_thresholds_that_are_not_finite_train_nothing(poison):
    thresholds, _, batch = problem(10, seed=3)
    thresholds[1, 2] = poison
    assert not clipped_sum(thresholds, batch).any()


@pytest.mark.parametrize("size", [1e-200, 1e-3, 1e3, 1e200])
def test_the_size_of_inputs_costs_no_precision(size):
    """As long as a photo's residuals are the same: at thresholds of zero they are a half whatever the inputs."""
    _, photos, batch = problem(50, seed=5)
    scaled = padded([size * rows for rows in photos], batch.grades)
    found = clipped_sum(np.zeros((GRADES - 1, 7)), scaled, max_grad_norm=size / 3)
    apart = np.linalg.norm(found - clipped_sum(np.zeros((GRADES - 1, 7)), batch, max_grad_norm=1 / 3))
    assert apart <= 50 * 2.0**-15 * GRID


def test_an_honest_item_passes_the_exact_check():
    """What the clip takes off beforehand is enough for rounding: items at the clip are there, and almost that long."""
    for most, features in ((1, 3840), (4, 300), (40, 20)):
        thresholds, photos, batch = problem(60, seed=most, features=features, most=most)
        for rows, grade in zip(photos, batch.grades, strict=True):
            found = clipped_sum(thresholds, padded([rows], [grade]), max_grad_norm=1e-4)
            assert GRID**2 * (1 - len(rows) * 2.0**-14) < squared_length(found) <= GRID**2


def test_a_squared_length_above_that_of_the_clip_by_one_is_found():
    products = FixedPointPhotos.of(np.array([[[1.0]], [[1.0]]])).products
    assert products.ravel().tolist() == [2**40, 2**40]
    at_the_clip, beyond = np.array([[[2.0**20]]]), np.array([[[2.0**20, 1.0]]])
    assert full_batch._on_grid(at_the_clip, products[:1]).tolist() == [[[2**20]]]
    assert full_batch._on_grid(beyond, products[:1]).tolist() == [[[0, 0]]]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 2.0**24 + 1, 2.0**31, 2.0**32, 2.0**63, 2.0**64, 1e300])
def test_the_exact_check_drops_whatever_is_too_long_or_no_number_and_nothing_else(wrong):
    """Without the clip before it, as two lines would have to go for such an item to get through."""
    *_, batch = problem(3, seed=6)
    residuals = np.full((3, batch.inputs.shape[1], 2), 1000.0)
    residuals[1, -1, 0] = wrong
    integers = full_batch._on_grid(residuals, batch.fixed_point.products)
    assert (integers[[0, 2]] == 1000).all()
    assert not integers[1].any()


def test_photos_that_cancel_cannot_hide_numbers_that_would_make_the_sum_inexact():
    there, back = np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])
    batch = padded([np.concatenate([there, back])], [1])
    for residual, passes in ((2.0**23, True), (2.0**24, False)):
        integers = full_batch._on_grid(np.full((1, 2, 1), residual), batch.fixed_point.products)
        assert integers.any() == passes


def test_photos_that_all_but_cancel_are_shortened_and_not_dropped():
    there, back = np.array([[1.0, 0.0]]), np.array([[-1.0, 0.002]])
    batch = padded([np.concatenate([there, back])], [0])
    first, second = clipped_sum(np.zeros((1, 2)), batch, max_grad_norm=1e-6)
    assert GRID / 100 < second < GRID / 10, "a thousandth is left of them, and a sixteenth to a thirty-second is exact"
    assert abs(first) < second / 1000


photo_residuals = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(
        arrays.arrays(np.int64, shape[:3], elements=st.integers(-(2**24), 2**24)),
        arrays.arrays(np.float64, (*shape[:2], shape[3]), elements=st.floats(-1.0, 1.0)),
    )
)


@given(photo_residuals)
def test_squared_lengths_are_those_of_the_rows_in_pythons_integers(pair):
    residuals, inputs = pair
    photos = FixedPointPhotos.of(inputs)
    integers = photos.integers.astype(np.float64).astype(np.int64).astype(object)
    rows = (residuals.astype(object)[:, :, :, None] * integers[:, :, None, :]).sum(axis=1).reshape(len(residuals), -1)
    found = full_batch._squared_lengths(residuals, photos.products)
    assert found.tolist() == [squared_length(row) for row in rows]


def test_the_largest_residuals_of_the_most_photos_are_measured_without_overflow():
    photos = FixedPointPhotos.of(np.full((1, 4096, 1), np.nextafter(2.0, 0)))
    (length,) = full_batch._squared_lengths(np.full((1, 4096, 31), 2**24), photos.products)
    assert length == 31 * (4096 * 2**24 * int(photos.integers[0, 0, 0])) ** 2


def test_sums_are_exact_up_to_the_largest_that_can_get_in():
    """A chunk of items of the largest reach, all pulling the same way: the last bit of each is still there."""
    items, rng = 150, np.random.default_rng(7)
    inputs = np.full((items, 1, 3), 2.0) - rng.random((items, 1, 3)) * 1e-3
    photos = FixedPointPhotos.of(inputs)
    residuals = 2**24 - rng.integers(0, 9, (items, 1, 2))
    total = np.zeros((2, 3), dtype=np.int64)
    full_batch._add_products(total, residuals, photos)
    integers = photos.integers[:, 0].astype(np.float64).astype(np.int64).astype(object)
    assert total.tolist() == (residuals[:, 0].T.astype(object) @ integers).tolist()


def test_a_mechanism_of_another_grid_is_refused():
    thresholds, _, batch = problem(2)
    with pytest.raises(PlanRefused, match=r"^grid: sensitivity 1048576; gradients are on the grid of 2\^40$"):
        clipped_gradient_sum(
            thresholds, batch, max_grad_norm=1.0, mechanism=DiscreteGaussian(sensitivity=2**20, scale=1)
        )


def test_more_items_than_64_bits_add_up_are_refused():
    items = 2**22 + 1
    many = ItemBatch(
        inputs=np.zeros((items, 1, 0)), photo_weights=np.ones((items, 1)), grades=np.zeros(items, dtype=np.int64)
    )
    with pytest.raises(PlanRefused, match=r"^grid: 4194305 items; sums of 64 bits hold 4194304 on it$"):
        clipped_sum(np.zeros((1, 0)), many)


def test_the_weights_that_came_in_are_not_changed():
    thresholds, _, batch = problem(5)
    before = thresholds.copy()
    clipped_sum(thresholds, batch)
    np.testing.assert_array_equal(thresholds, before)
