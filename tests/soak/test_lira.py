"""The attack's own arithmetic, in seconds: what it must find where the answer is known."""

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from tests.soak.lira import FALSE_POSITIVE_RATE, attack_scores, power, random_halves

MODELS, ITEMS = 32, 800


def confidences(rng, members, *, shift):
    """Each item at a height of its own, ``shift`` higher in models that were shown it, with noise of deviation 1."""
    heights = 3.0 * rng.normal(size=members.shape[1])
    return heights + shift * members + rng.normal(size=members.shape)


def test_each_item_s_membership_is_a_coin_of_its_own():
    members = random_halves(MODELS, ITEMS, np.random.default_rng(0)).astype(float)
    assert members.mean() == pytest.approx(0.5, abs=0.02)
    for by in (members, members.T):
        together = np.corrcoef(by)[np.triu_indices(len(by), k=1)]
        assert abs(together.mean()) < 5 / np.sqrt(members.size)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_the_attack_is_as_strong_as_the_shift_allows_and_no_stronger(shift):
    """Nothing tells two normals apart better than their likelihood ratio; 15 shadows a side cost a little of it."""
    rng = np.random.default_rng(3)
    members = random_halves(MODELS, ITEMS, rng)
    found = power(attack_scores(confidences(rng, members, shift=shift), members), members, rng)
    best_area, best_rate = ndtr(shift / np.sqrt(2)), ndtr(shift + ndtri(FALSE_POSITIVE_RATE))
    assert found.area_under_curve.low <= best_area
    assert found.area_under_curve.measured == pytest.approx(best_area, abs=0.03)
    assert found.true_positive_rate.low <= best_rate
    assert found.true_positive_rate.measured >= best_rate / 2


def test_an_attack_on_noise_finds_nothing_in_either_direction():
    """No item may stand out for how many shadows saw it, nor the target for being missing among its own shadows."""
    rng = np.random.default_rng(5)
    members = random_halves(16, 4000, rng)
    found = power(attack_scores(confidences(rng, members, shift=0.0), members), members, rng)
    assert found.area_under_curve.low < 0.5 < found.area_under_curve.high
    assert found.area_under_curve.high - found.area_under_curve.low < 0.02


def test_scores_that_tell_everything_and_scores_that_tell_nothing():
    rng = np.random.default_rng(1)
    members = random_halves(MODELS, ITEMS, rng)
    told = power(members.astype(float), members, rng)
    assert told.area_under_curve.low == told.true_positive_rate.low == 1.0
    silent = power(rng.normal(size=members.shape), members, rng)
    assert silent.area_under_curve.low < 0.5 < silent.area_under_curve.high
    assert silent.true_positive_rate.low < FALSE_POSITIVE_RATE < silent.true_positive_rate.high
