import random

import numpy as np
import pytest
import torch

from fedgrade.errors import ModelRefused
from fedgrade.items import ItemBatch
from fedgrade.model.networks import PhotoLinear
from fedgrade.privacy.plan import exact
from fedgrade.training import SgdRecipe, train_by_sgd
from fedgrade.trust.records import PoissonGaussian
from tests.few_items import GRADES, clipped_by_hand, closed_form_rows, padded, problem

FIVE_DEVIATIONS = 5.0  # by chance once in 1.7 million runs


def trained(thresholds, batch, recipe):
    """The change of a head's thresholds."""
    return train_by_sgd(PhotoLinear(thresholds), batch, recipe).reshape(thresholds.shape)


def test_the_weights_that_came_in_are_not_changed():
    thresholds, _, batch = problem(5)
    before = thresholds.copy()
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
