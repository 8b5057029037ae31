import math
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedgrade.privacy.accounting import gaussian_delta
from fedgrade.privacy.bounds import least_epsilon, renyi_epsilon

ORDERS = (*range(2, 64), 128, 256, 512, 1024)

rates = st.floats(1e-3, 1.0)
noises = st.floats(0.4, 60.0)
deltas = st.floats(1e-9, 1e-2)


def exact_delta_of_one_step(epsilon, rate, noise):
    """The likelihood ratio grows with the output, so that the strongest event is a threshold, found in closed form."""
    if math.exp(epsilon) <= 1 - rate:
        return 1 - math.exp(epsilon)
    threshold = noise**2 * math.log((math.exp(epsilon) - 1 + rate) / rate) + 0.5
    without, shifted = norm.sf(threshold / noise), norm.sf((threshold - 1) / noise)
    return (1 - rate) * without + rate * shifted - math.exp(epsilon) * without


@settings(max_examples=30)
@given(rates, noises, deltas)
def test_of_one_step_the_attack_reaches_the_exact_epsilon_and_never_passes_it(rate, noise, delta):
    found = least_epsilon([(rate, noise, 1)], delta=delta)
    assert exact_delta_of_one_step(found, rate, noise) >= delta * (1 - 1e-6) or found == 0.0
    exact = 0.0
    if exact_delta_of_one_step(0.0, rate, noise) > delta:
        exact = brentq(lambda epsilon: exact_delta_of_one_step(epsilon, rate, noise) - delta, 0.0, 60.0)
    assert exact * 0.95 - 1e-2 <= found <= exact + 1e-6


@settings(max_examples=30)
@given(noises, st.integers(1, 5000), deltas)
def test_of_steps_on_everyone_the_attack_reaches_the_exact_epsilon_of_the_gaussian(noise, steps, delta):
    rho = Fraction(steps) / (2 * Fraction(noise) ** 2)
    if rho > 100:
        return
    found, exact = least_epsilon([(1.0, noise, steps)], delta=delta), 0.0
    if gaussian_delta(0.0, rho=rho) > delta:
        exact = brentq(lambda epsilon: gaussian_delta(epsilon, rho=rho) - delta, 0.0, 400.0)
    assert exact * 0.995 - 1e-3 <= found <= exact + 1e-6


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.3, 1.0, 2), (0.05, 0.6, 2), (0.5, 3.0, 3)])
def test_of_a_few_steps_no_event_convicts_an_accountant_that_is_right(rate, noise, steps):
    """Second method: the exact delta, by integrating the excess over all outputs of each step on a grid."""
    found = least_epsilon([(rate, noise, steps)], delta=1e-4)
    with_item, without = [1.0], [1.0]
    width = noise / 12
    outputs = [width * k for k in range(int(-7 * noise / width), int((1 + 7 * noise) / width) + 1)]
    for _ in range(steps):
        q = [norm_mass(x, noise, width) for x in outputs]
        p = [(1 - rate) * mass + rate * norm_mass(x - 1, noise, width) for x, mass in zip(outputs, q, strict=True)]
        with_item, without = merged_by_ratio(with_item, without, p, q)
    excess = sum(max(0.0, a - math.exp(found) * b) for a, b in zip(with_item, without, strict=True))
    assert excess >= 1e-4 * 0.98
    assert found > 0


def norm_mass(x, noise, width):
    return math.exp(-((x / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi)) * width


def merged_by_ratio(with_item, without, p, q):
    """The pairs of masses of one more step; those of nearly the same ratio are put together, which loses nothing."""
    bins = {}
    for a, b in zip(with_item, without, strict=True):
        for x, y in zip(p, q, strict=True):
            key = round(math.log(a * x / (b * y)) * 200)
            old = bins.get(key, (0.0, 0.0))
            bins[key] = (old[0] + a * x, old[1] + b * y)
    return [a for a, _ in bins.values()], [b for _, b in bins.values()]


@pytest.mark.parametrize(("rate", "noise", "order"), [(0.05, 1.0, 3), (0.5, 2.0, 20), (1.0, 4.0, 10), (1e-3, 0.6, 7)])
def test_renyi_divergences_are_those_of_the_integral(rate, noise, order):
    found = renyi_epsilon([(rate, noise, 9)], orders=[order], delta=1e-5)
    with mpmath.workdps(30):
        q = lambda x: mpmath.npdf(x, 0, noise)  # noqa: E731
        ratio = lambda x: 1 - rate + rate * mpmath.exp((2 * x - 1) / (2 * noise**2))  # noqa: E731
        ends = [-12 * noise, 0, order / 2, order, order + 12 * noise]
        divergence = 9 * mpmath.log(mpmath.quad(lambda x: q(x) * ratio(x) ** order, ends)) / (order - 1)
        exact = divergence + mpmath.log(1 - mpmath.mpf(1) / order) - mpmath.log(1e-5 * order) / (order - 1)
    assert found == pytest.approx(float(exact), rel=1e-9)


@settings(max_examples=30)
@given(rates, noises, st.integers(1, 5000), deltas)
def test_the_bound_from_below_is_below_the_bound_from_above(rate, noise, steps, delta):
    kind = (rate, noise, steps)
    assert least_epsilon([kind], delta=delta) <= renyi_epsilon([kind], orders=ORDERS, delta=delta) + 1e-9


@pytest.mark.parametrize("kind", [(0.5, 1.0, 10**9), (1e-9, 1e-3, 10**18), (1.0, 1e-6, 5), (1e-12, 1e6, 1)])
def test_hostile_numbers_of_steps_take_no_longer(kind):
    assert 0.0 <= least_epsilon([kind], delta=1e-5) <= renyi_epsilon([kind], orders=ORDERS, delta=1e-5)
