"""Bounds on attacks, against the Gaussian mechanism's exact curve below and (epsilon, delta) alone above."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.privacy.attack import (
    FALSE_POSITIVE_RATE,
    bound_from_epsilon,
    bound_from_rho,
    bound_from_zcdp_epsilon,
    true_positive_rates,
)

DELTA = Fraction(1, 10**5)
RHOS = st.fractions(min_value=Fraction(1, 1000), max_value=Fraction(4), max_denominator=1000)


@settings(max_examples=15, deadline=None)
@given(RHOS)
def test_no_bound_is_below_what_the_gaussian_mechanism_really_gives_away(rho):
    shift = float(2 * rho) ** 0.5
    bound = bound_from_rho(rho)
    assert bound.true_positive_rate >= norm.cdf(norm.ppf(FALSE_POSITIVE_RATE) + shift) - 1e-9
    assert bound.area_under_curve >= norm.cdf(shift / 2**0.5) - 1e-9


@settings(max_examples=15, deadline=None)
@given(RHOS)
def test_knowing_rho_never_says_less_than_epsilon_and_delta(rho):
    exact, loose = bound_from_rho(rho), bound_from_epsilon(zcdp_epsilon(rho, delta=DELTA), delta=DELTA)
    assert exact.true_positive_rate <= loose.true_positive_rate + 1e-4
    assert exact.area_under_curve <= loose.area_under_curve + 2e-3


@settings(max_examples=10, deadline=None)
@given(RHOS)
def test_going_through_epsilon_and_back_never_understates(rho):
    direct = bound_from_rho(rho)
    back = bound_from_zcdp_epsilon(zcdp_epsilon(rho, delta=DELTA), delta=DELTA)
    assert back.true_positive_rate >= min(direct.true_positive_rate, back.true_positive_rate) - 1e-9
    assert back.true_positive_rate == pytest.approx(direct.true_positive_rate, abs=1e-4)
    assert back.area_under_curve == pytest.approx(direct.area_under_curve, abs=1e-4)


@given(st.floats(0.001, 20.0))
def test_the_area_of_epsilon_and_delta_is_that_of_its_own_trade_off_curve(epsilon):
    rates = np.linspace(0.0, 1.0, 20_001)
    tail = float(DELTA)
    curve = np.minimum(1.0, np.minimum(np.exp(epsilon) * rates + tail, 1 - np.exp(-epsilon) * (1 - tail - rates)))
    area = float(np.trapezoid(curve, rates))
    assert bound_from_epsilon(epsilon, delta=DELTA).area_under_curve == pytest.approx(area, abs=2e-4)


@settings(max_examples=15, deadline=None)
@given(RHOS, RHOS)
def test_more_privacy_spent_never_makes_an_attack_weaker(one, other):
    low, high = sorted((one, other))
    assert bound_from_rho(low).true_positive_rate <= bound_from_rho(high).true_positive_rate + 1e-12
    assert bound_from_rho(low).area_under_curve <= bound_from_rho(high).area_under_curve + 1e-12


def test_nothing_spent_leaves_an_attacker_guessing():
    bound = bound_from_rho(Fraction(0))
    assert bound.true_positive_rate == pytest.approx(0.01, abs=1e-6)
    assert bound.area_under_curve == pytest.approx(0.5, abs=1e-3)


def test_an_absurd_epsilon_bounds_nothing():
    bound = bound_from_zcdp_epsilon(1e6, delta=DELTA)
    assert bound.true_positive_rate == 1.0
    assert bound.area_under_curve == pytest.approx(1.0)


def test_golden_bounds_at_the_usual_epsilons():
    rates = [bound_from_zcdp_epsilon(epsilon, delta=DELTA).true_positive_rate for epsilon in (1.0, 2.0, 4.0, 8.0)]
    areas = [bound_from_zcdp_epsilon(epsilon, delta=DELTA).area_under_curve for epsilon in (1.0, 2.0, 4.0, 8.0)]
    assert rates == pytest.approx([0.0206, 0.0368, 0.0940, 0.3290], abs=5e-4)
    assert areas == pytest.approx([0.586, 0.658, 0.776, 0.919], abs=2e-3)


def test_the_trade_off_curve_keeps_within_its_corners():
    rates = true_positive_rates(np.array([0.0, 0.5, 1.0]), rho=0.3)
    assert rates[0] == pytest.approx(0.0, abs=1e-9)
    assert 0.5 < rates[1] < 1.0
    assert rates[2] == 1.0
