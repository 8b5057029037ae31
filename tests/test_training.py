import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from opacus import GradSampleModule
from torch.nn import functional

from fedgrade.errors import ModelRefused
from fedgrade.full_batch import _gradient_rows, clipped_gradient_sum
from fedgrade.items import ItemBatch
from fedgrade.model.head import head_inputs, item_mean, ordinal_gradient
from fedgrade.model.networks import PhotoLinear
from fedgrade.privacy.plan import exact
from fedgrade.training import SgdRecipe, train_by_sgd
from fedgrade.trust.records import DiscreteGaussian, PoissonGaussian

GRID = 2**20
MECHANISM = DiscreteGaussian(sensitivity=GRID, scale=3)
FIVE_DEVIATIONS = 5.0  # by chance once in 1.7 million runs
GRADES = 4


def padded(photos, grades):
    """Items from lists of their photos [photos, features], as a site pads them."""
    most = max((len(rows) for rows in photos), default=1)
    features = len(photos[0][0]) if photos else 1
    inputs, weights = np.zeros((len(photos), most, features)), np.zeros((len(photos), most))
    for item, rows in enumerate(photos):
        inputs[item, : len(rows)], weights[item, : len(rows)] = rows, 1 / len(rows)
    return ItemBatch(inputs=inputs, photo_weights=weights, grades=np.array(grades, dtype=np.int64))


def problem(items, *, seed=0, features=6, most=4):
    """Thresholds, and items of 1 to ``most`` photos each as lists and as a batch."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=features) * 0.1
    photos = [head_inputs(rng.normal(size=(rng.integers(1, most + 1), features)), centre) for _ in range(items)]
    grades = rng.integers(0, GRADES, items)
    return rng.normal(size=(GRADES - 1, features + 1)), photos, padded(photos, grades)


def flat(photos):
    return np.concatenate(photos), np.repeat(np.arange(len(photos)), [len(rows) for rows in photos])


def closed_form_rows(thresholds, photos, grades):
    """Gradients [items, ...] of items' mean losses."""
    inputs, item_index = flat(photos)
    per_photo = ordinal_gradient(thresholds, inputs, grades[item_index])
    return item_mean(per_photo, item_index, len(photos)).reshape(len(photos), -1)


def autograd_row(thresholds, rows, grade):
    weights = torch.from_numpy(thresholds).requires_grad_()
    scores = torch.from_numpy(rows) @ weights.T
    above = (torch.arange(len(thresholds)) < int(grade)).to(scores.dtype).expand_as(scores)
    loss = functional.binary_cross_entropy_with_logits(scores, above, reduction="none").sum(dim=1).mean()
    (gradient,) = torch.autograd.grad(loss, weights)
    return gradient.numpy().ravel()


def opacus_rows(thresholds, batch):
    """Gradients [items, ...] by Opacus' own hooks, which training does without."""
    module = GradSampleModule(PhotoLinear(thresholds), batch_first=True, loss_reduction="sum")
    scores = module(torch.from_numpy(batch.inputs).requires_grad_())
    above = torch.from_numpy(batch.grades[:, None] > np.arange(len(thresholds))).to(scores)[:, None].expand_as(scores)
    losses = functional.binary_cross_entropy_with_logits(scores, above, reduction="none").sum(dim=2)
    (losses * torch.from_numpy(batch.photo_weights)).sum().backward()
    return next(module.parameters()).grad_sample.reshape(len(batch), -1).numpy()


def trained(thresholds, batch, recipe):
    """The change of a head's thresholds."""
    return train_by_sgd(PhotoLinear(thresholds), batch, recipe).reshape(thresholds.shape)


def clipped_by_hand(row, max_grad_norm):
    return row * min(1.0, max_grad_norm / np.linalg.norm(row))


def on_the_grid(row, max_grad_norm):
    return np.trunc(clipped_by_hand(row, max_grad_norm) / max_grad_norm * (GRID - 1)).astype(np.int64)


def clipped_sum(thresholds, batch, *, max_grad_norm=1.0):
    return clipped_gradient_sum(thresholds, batch, max_grad_norm=max_grad_norm, mechanism=MECHANISM)


def squared_length(integers):
    """In Python's integers, which cannot overflow."""
    return sum(int(entry) ** 2 for entry in integers)


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.7, 100.0])
def test_the_sum_is_the_closed_forms_clipped_and_put_on_the_grid_by_hand(max_grad_norm):
    thresholds, photos, batch = problem(40)
    rows = closed_form_rows(thresholds, photos, batch.grades)
    expected = sum(on_the_grid(row, max_grad_norm) for row in rows)
    found = clipped_sum(thresholds, batch, max_grad_norm=max_grad_norm)
    # A last bit may fall on the other side of a cell's border, for one entry of one item now and then.
    assert np.abs(found - expected).max() <= 1
    assert np.abs(expected).max() > 1000


def test_the_sum_is_autograds_one_item_at_a_time():
    thresholds, photos, batch = problem(30, seed=1)
    rows = [autograd_row(thresholds, rows, grade) for rows, grade in zip(photos, batch.grades, strict=True)]
    np.testing.assert_allclose(rows, closed_form_rows(thresholds, photos, batch.grades), atol=1e-12)
    found = clipped_sum(thresholds, batch, max_grad_norm=0.5)
    assert np.abs(found - sum(on_the_grid(row, 0.5) for row in rows)).max() <= 1


def test_the_sum_is_that_of_opacus_per_sample_gradients():
    """The full-batch sum is a closed form; Opacus, which trains in mode local_sgd, is the second opinion on it."""
    thresholds, _, batch = problem(30, seed=8)
    rows = opacus_rows(thresholds, batch)
    found = clipped_sum(thresholds, batch, max_grad_norm=0.5)
    assert np.abs(found - sum(on_the_grid(row, 0.5) for row in rows)).max() <= 1


def test_an_item_with_ten_photos_counts_once():
    thresholds, photos, _ = problem(2, seed=2, most=1)
    once, ten_times = padded(photos, [3, 0]), padded([np.repeat(photos[0], 10, axis=0), photos[1]], [3, 0])
    assert np.abs(clipped_sum(thresholds, once) - clipped_sum(thresholds, ten_times)).max() <= 1


def test_photos_are_averaged_before_the_item_is_clipped():
    # Opposite photos of one item: clipped apart they would leave something, averaged they leave nothing.
    there, back = np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])
    batch = padded([np.concatenate([there, back])], [1])
    assert clipped_sum(np.zeros((1, 2)), batch, max_grad_norm=0.1).tolist() == [0, 0]
    long = padded([np.concatenate([5 * there, back])], [1])
    assert clipped_sum(np.zeros((1, 2)), long, max_grad_norm=0.1).tolist() == [-(GRID - 1), 0]


@pytest.mark.parametrize("items", [1, 15, 16, 17, 129])
def test_every_item_counts_once_wherever_the_chunks_end(items):
    # At thresholds of zero the residual is exactly a half, and a half of 2^20 - 1 cells is 524287 whole ones.
    photos = [np.eye(3)[[item % 3]] for item in range(items)]
    found = clipped_sum(np.zeros((1, 3)), padded(photos, [0] * items))
    assert found.tolist() == [524_287 * len(range(column, items, 3)) for column in range(3)]


@pytest.mark.parametrize(("items", "features"), [(130, 40), (9, 3840), (300, 64)])
def test_an_items_part_of_the_sum_is_its_own_to_the_last_bit(items, features):
    # Else one item more could move every other item's row across a border of the grid.
    thresholds, photos, batch = problem(items, seed=9, features=features)
    alone = [padded([rows], [grade]) for rows, grade in zip(photos, batch.grades, strict=True)]
    unpadded = [np.concatenate(list(_gradient_rows(thresholds, one))) for one in alone]
    together = np.concatenate(list(_gradient_rows(thresholds, batch)))
    np.testing.assert_array_equal(np.concatenate(unpadded), together)
    np.testing.assert_array_equal(sum(clipped_sum(thresholds, one) for one in alone), clipped_sum(thresholds, batch))


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
clips = st.sampled_from([1e-305, 1e-3, 1.0, 7.3, 1e300])


@settings(max_examples=150)
@given(hostile_batches, clips, st.floats(-1e3, 1e3), st.data())
def test_one_item_more_or_less_moves_the_sum_by_at_most_the_sensitivity(batch, clip, weight, data):
    thresholds = np.full((2, batch.inputs.shape[2]), weight)
    left_out = data.draw(st.integers(0, len(batch) - 1))
    rest = batch.take(np.arange(len(batch)) != left_out)
    moved = clipped_sum(thresholds, batch, max_grad_norm=clip) - clipped_sum(thresholds, rest, max_grad_norm=clip)
    assert squared_length(moved) <= GRID**2


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_an_item_that_is_not_finite_counts_as_absent_and_spoils_no_other(poison):
    thresholds, photos, batch = problem(10, seed=3)
    spoilt = [rows.copy() for rows in photos]
    spoilt[4][-1, 2] = poison
    rest = padded([rows for item, rows in enumerate(photos) if item != 4], np.delete(batch.grades, 4))
    found = clipped_sum(thresholds, padded(spoilt, batch.grades))
    assert np.abs(found - clipped_sum(thresholds, rest)).max() <= 1


def test_the_weights_that_came_in_are_not_changed():
    thresholds, _, batch = problem(5)
    before = thresholds.copy()
    clipped_sum(thresholds, batch)
    trained(thresholds, batch, recipe())
    np.testing.assert_array_equal(thresholds, before)


def test_a_batch_does_not_show_its_items():
    assert repr(problem(2)[2]) == "ItemBatch(<sensitive>)"


@pytest.mark.parametrize("wrong", [{"photo_weights": np.ones((2, 3))}, {"grades": np.zeros(3, dtype=np.int64)}])
def test_arrays_that_are_not_of_the_same_items_are_refused(wrong):
    arrays_of_two = {"inputs": np.zeros((2, 1, 5)), "photo_weights": np.ones((2, 1)), "grades": np.zeros(2, np.int64)}
    with pytest.raises(ModelRefused, match=r"^item batch: inputs, photo weights and grades are not of the same items$"):
        ItemBatch(**{**arrays_of_two, **wrong})


def recipe(*, rate=1.0, noise=1.0, steps=3, learning_rate=0.5, max_grad_norm=0.3, declared_items=20):
    mechanism = PoissonGaussian(
        sampling_rate=exact(rate), noise_multiplier=exact(noise), steps=steps, planned_steps=steps
    )
    return SgdRecipe(
        mechanism=mechanism, max_grad_norm=max_grad_norm, learning_rate=learning_rate, declared_items=declared_items
    )


def one_hot_items(items):
    """Item number i alone has feature i: at thresholds of zero its gradient is a half there."""
    return padded([np.eye(items)[[item]] for item in range(items)], [0] * items)


@pytest.mark.parametrize(("declared_items", "expected_batch"), [(1, 1), (40_000_000, 40)])
def test_empty_batches_are_steps_of_noise_alone_and_of_the_promised_size(declared_items, expected_batch):
    *_, batch = problem(5, features=1999)
    # Five items, nine steps, one in a million: some item is ever drawn in one of 20,000 runs, and then it is lost
    # in the noise.
    alone = recipe(rate=1e-6, noise=50.0, steps=9, learning_rate=0.5, declared_items=declared_items)
    update = trained(np.zeros((GRADES - 1, 2000)), batch, alone)
    deviation = 0.5 * 50.0 * 0.3 * np.sqrt(9) / expected_batch
    draws = update.ravel() / deviation
    assert abs(draws.mean()) <= FIVE_DEVIATIONS / np.sqrt(draws.size)
    assert abs(draws.std() - 1) <= FIVE_DEVIATIONS / np.sqrt(2 * draws.size)


def test_a_batch_without_any_item_to_draw_from_is_stepped_too():
    empty = ItemBatch(inputs=np.zeros((0, 1, 900)), photo_weights=np.zeros((0, 1)), grades=np.zeros(0, dtype=np.int64))
    update = trained(np.zeros((1, 900)), empty, recipe(rate=0.5, noise=2.0, steps=4, declared_items=2))
    assert abs(update.std() / (0.5 * 2.0 * 0.3 * 2) - 1) <= FIVE_DEVIATIONS / np.sqrt(2 * 900)


def test_no_seed_can_reproduce_an_update():
    thresholds, _, batch = problem(10)

    def update(chosen):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the old global generator is exactly what must not matter
        torch.manual_seed(0)
        return trained(thresholds, batch, chosen)

    assert not np.array_equal(update(recipe()), update(recipe()))
    # Without noise to speak of, two runs differ by their batches alone.
    sampled = recipe(rate=0.5, noise=1e-12, steps=20)
    assert np.abs(update(sampled) - update(sampled)).max() > 1e-6


def test_without_noise_and_sampling_it_is_plain_clipped_descent():
    thresholds, photos, batch = problem(20, seed=5)
    update = trained(thresholds, batch, recipe(noise=1e-12, steps=6))
    weights = thresholds.copy()
    for _ in range(6):
        rows = [clipped_by_hand(row, 0.3) for row in closed_form_rows(weights, photos, batch.grades)]
        weights -= 0.5 * np.sum(rows, axis=0).reshape(weights.shape) / 20
    # Opacus adds a millionth to each norm before it divides by it.
    np.testing.assert_allclose(update, weights - thresholds, atol=1e-5)
    assert np.abs(update).max() > 0.01


def test_steps_are_scaled_by_what_was_declared_not_by_what_is_there():
    thresholds, _, batch = problem(20, seed=6)
    one, other = (
        trained(thresholds, batch, recipe(noise=1e-12, steps=1, declared_items=declared)) for declared in (20, 40)
    )
    np.testing.assert_allclose(one, 2 * other, atol=1e-9)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_an_item_that_is_not_finite_adds_nothing_to_an_update(poison):
    thresholds, photos, batch = problem(12, seed=7)
    spoilt = [rows.copy() for rows in photos]
    spoilt[0][0, 0] = poison
    rest = padded(photos[1:], batch.grades[1:])
    noiseless = recipe(noise=1e-12, steps=4)
    found = trained(thresholds, padded(spoilt, batch.grades), noiseless)
    np.testing.assert_allclose(found, trained(thresholds, rest, noiseless), atol=1e-9)


def test_a_huge_item_moves_a_step_no_further_than_the_clip():
    thresholds, photos, batch = problem(3, seed=8, most=1)
    huge = padded([1e200 * rows for rows in photos], batch.grades)
    update = trained(thresholds, huge, recipe(noise=1e-12, steps=1, declared_items=3))
    assert np.isfinite(update).all()
    assert np.linalg.norm(update) <= 0.5 * 0.3 * (1 + 1e-6)


def test_every_item_joins_a_step_on_its_own_at_the_sampling_rate():
    items, rate, runs = 400, 0.3, 25
    batch, tiny = one_hot_items(items), recipe(rate=rate, noise=1e-9, steps=1, declared_items=items)
    joined = np.array([trained(np.zeros((1, items)), batch, tiny)[0] < -1e-6 for _ in range(runs)])
    deviations = (joined.sum() - items * runs * rate) / np.sqrt(items * runs * rate * (1 - rate))
    assert abs(deviations) <= FIVE_DEVIATIONS
    # Poisson, not batches of one size: their variance is the binomial one (24 degrees of freedom; by chance < 1e-9).
    sizes = joined.sum(axis=1)
    assert len(set(sizes)) > 1
    excess = sizes.var() / (items * rate * (1 - rate))
    assert 0.05 < excess < 4
