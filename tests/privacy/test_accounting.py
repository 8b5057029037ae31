import json
import math
import random
import warnings
from fractions import Fraction

import mpmath
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedgrade.errors import PlanRefused
from fedgrade.privacy import accounting
from fedgrade.privacy.accounting import (
    MIN_DELTA,
    gaussian_delta,
    poisson_epsilon,
    poisson_noise_multiplier,
    printed,
    strongest_attack,
    zcdp_epsilon,
    zcdp_rho,
)

DELTA = Fraction(1, 10**5)

# docs: sampling rate, noise multiplier, steps.
SCHEDULES = (
    ("0.05", "1", 500),
    ("0.01", "1", 1000),
    ("0.1", "4", 400),
    ("0.25", "8", 200),
    ("1", "10", 50),
    ("0.5", "40", 100),
    ("0.05", "0.6", 100),
)
# Where accountants come apart: 120 by the privacy loss distribution, 132 and 216 by two Rényi accountants.
MUCH_LOSS = ("0.05", "0.3", 300)

rhos = st.fractions(min_value=Fraction(1, 10**9), max_value=900)
deltas = st.fractions(min_value=MIN_DELTA, max_value=Fraction(1, 100))


def poisson(rate, noise, steps):
    return poisson_epsilon({(Fraction(rate), Fraction(noise)): steps}, delta=DELTA)


def minimised_in_high_precision(rho, delta):
    """Canonne, Kamath and Steinke (2020), Proposition 12, minimised anew in 40 digits by golden section."""
    with mpmath.workdps(40):
        cost, tail = (mpmath.mpf(part.numerator) / part.denominator for part in (rho, delta))

        def bound(log_excess):
            excess = mpmath.exp(log_excess)
            alpha = 1 + excess
            return alpha * cost + mpmath.log(1 / (alpha * tail)) / excess + mpmath.log(1 - 1 / alpha)

        ratio = (mpmath.sqrt(5) - 1) / 2
        centre = min(range(-20, 30), key=bound)
        low, high = mpmath.mpf(centre - 1), mpmath.mpf(centre + 1)
        for _ in range(120):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            low, high = (low, right) if bound(left) < bound(right) else (left, high)
        return max(mpmath.mpf(0), bound(low))


@pytest.fixture(scope="module")
def epsilons():
    """What the accountant says of each schedule, computed once and honestly."""
    return {schedule: poisson(*schedule) for schedule in SCHEDULES}


def exact_gaussian_epsilon(rho, delta):
    return brentq(lambda epsilon: gaussian_delta(epsilon, rho=rho) - float(delta), 1e-12, 400)


# --- zero-concentrated differential privacy -----------------------------------------------------------------------


@settings(max_examples=60)
@given(rhos, deltas)
@example(Fraction(1, 10**9), MIN_DELTA)
@example(Fraction(900), MIN_DELTA)
def test_zcdp_is_minimised_as_in_forty_digits_and_never_below(rho, delta):
    truth = minimised_in_high_precision(rho, delta)
    found = zcdp_epsilon(rho, delta=delta)
    assert found >= truth
    assert found <= truth * (1 + 1e-8) + 1e-12


@given(rhos, deltas)
def test_the_claim_covers_the_exact_gaussian_mechanism(rho, delta):
    # Balle and Wang (2018): the exact delta of the Gaussian at the claimed epsilon.
    epsilon = zcdp_epsilon(rho, delta=delta)
    assume(epsilon < 600)
    assert gaussian_delta(epsilon, rho=rho) <= float(delta)


@pytest.mark.parametrize("scale", [1, 2, 5, 12])
def test_the_claim_covers_the_exact_discrete_gaussian(scale):
    epsilon = zcdp_epsilon(Fraction(1, 2 * scale**2), delta=DELTA)
    with mpmath.workdps(30):
        mass = {x: mpmath.exp(-mpmath.mpf(x * x) / (2 * scale**2)) for x in range(-40 * scale, 40 * scale + 1)}
        total = sum(mass.values())
        excess = sum(max(mpmath.mpf(0), mass[x] - mpmath.exp(epsilon) * mass[x - 1]) for x in list(mass)[1:]) / total
    assert excess <= float(DELTA)
    # Not idle: a claim 20 % lower would be false.
    assert gaussian_delta(0.8 * epsilon, rho=Fraction(1, 2 * scale**2)) > float(DELTA)


@given(rhos, rhos, deltas)
def test_more_rho_never_costs_less(one, other, delta):
    low, high = sorted((one, other))
    assert zcdp_epsilon(low, delta=delta) <= zcdp_epsilon(high, delta=delta) * (1 + 1e-9)


@given(rhos, deltas, deltas)
def test_a_smaller_delta_never_costs_less(rho, one, other):
    small, large = sorted((one, other))
    assert zcdp_epsilon(rho, delta=large) <= zcdp_epsilon(rho, delta=small) * (1 + 1e-9) + 1e-12


@given(rhos, rhos, deltas)
def test_two_releases_together_cost_at_least_each(one, other, delta):
    together = zcdp_epsilon(one + other, delta=delta)
    assert together * (1 + 1e-9) >= max(zcdp_epsilon(one, delta=delta), zcdp_epsilon(other, delta=delta))


def test_nothing_released_costs_nothing():
    assert zcdp_epsilon(Fraction(0), delta=DELTA) == 0.0
    assert poisson_epsilon({}, delta=DELTA) == 0.0
    assert poisson_epsilon({(Fraction(1, 2), Fraction(1)): 0}, delta=DELTA) == 0.0


@settings(max_examples=60)
@given(st.fractions(min_value=Fraction(1, 10**6), max_value=500), deltas)
@example(Fraction(1, 10**9), MIN_DELTA)
def test_rho_and_epsilon_are_inverse_and_rounding_favours_privacy(epsilon, delta):
    rho = zcdp_rho(epsilon, delta=delta)
    assert rho > 0
    assert zcdp_epsilon(rho, delta=delta) <= epsilon
    assert zcdp_epsilon(rho * (1 + Fraction(1, 2**30)), delta=delta) > epsilon * (1 - Fraction(1, 2**20))


def test_a_hostile_ledger_cannot_overflow_the_accountant():
    assert zcdp_epsilon(Fraction(10**500), delta=DELTA) == math.inf
    assert zcdp_epsilon(Fraction(1, 10**500), delta=DELTA) == 0.0


@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 10**9 + 1), Fraction(2)])
def test_a_delta_out_of_range_is_refused(delta):
    for ask in (zcdp_epsilon, zcdp_rho):
        with pytest.raises(PlanRefused, match="delta"):
            ask(Fraction(1), delta=delta)
    with pytest.raises(PlanRefused, match="delta"):
        poisson_epsilon({(Fraction(1), Fraction(1)): 1}, delta=delta)


def test_impossible_costs_are_refused():
    with pytest.raises(PlanRefused, match="cannot give privacy back"):
        zcdp_epsilon(Fraction(-1, 10**9), delta=DELTA)
    for epsilon in (Fraction(0), Fraction(-1), Fraction(10**6)):
        with pytest.raises(PlanRefused, match="must be above 0 and below"):
            zcdp_rho(epsilon, delta=DELTA)


# --- golden numbers -----------------------------------------------------------------------------------------------


@pytest.mark.no_cover
def test_golden_epsilons(frozen):
    names = ("sampling_rate", "noise_multiplier", "steps")
    rows = [
        {**dict(zip(names, schedule, strict=True)), "epsilon": f"{poisson(*schedule):.4f}"}
        for schedule in (*SCHEDULES, MUCH_LOSS)
    ]
    rows += [
        {"rho": rho, "epsilon": f"{zcdp_epsilon(Fraction(rho), delta=DELTA):.9f}"}
        for rho in ("1/1000", "1/100", "1/10", "1/2", "1", "2", "10", "100")
    ]
    frozen("epsilon.json", (json.dumps({"delta": "1e-5", "rows": rows}, indent=1) + "\n").encode())


@pytest.mark.parametrize(("epsilon", "noise"), [(1, 33.37), (2, 17.83), (4, 9.67), (8, 5.37)])
def test_eighty_full_batch_steps_need_this_much_noise(epsilon, noise):
    # The continuous Gaussian's own closed form; what zCDP charges for the same noise is a little more, never less.
    rho = Fraction(80) / (2 * Fraction(str(noise)) ** 2)
    assert exact_gaussian_epsilon(rho, DELTA) == pytest.approx(epsilon, rel=1e-3)
    assert epsilon * 1.05 < zcdp_epsilon(rho, delta=DELTA) < epsilon * 1.1


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "relative_noise"), [(2, "1/2", 60, "15.7"), (2, "1/4", 200, "28.7")]
)
def test_subsampling_needs_this_much_noise_for_its_rate(epsilon, rate, steps, relative_noise):
    assert poisson(rate, Fraction(relative_noise) * Fraction(rate), steps) == pytest.approx(epsilon, rel=1e-2)


# --- Poisson sampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "steps"), [("10", 50), ("3", 2)])
def test_a_sample_of_everyone_is_the_plain_gaussian(noise, steps):
    rho = Fraction(steps) / (2 * Fraction(noise) ** 2)
    truth = exact_gaussian_epsilon(rho, DELTA)
    assert truth <= poisson(1, noise, steps) <= truth + 1e-2


@settings(max_examples=2)
@given(st.sampled_from([2, 5, 20]), st.sampled_from([8, 12, 16]), st.integers(1, 60))
def test_more_steps_a_higher_rate_or_less_noise_never_cost_less(rate, noise, steps):
    base = poisson(Fraction(rate, 100), Fraction(noise, 4), steps)
    assert base <= poisson(Fraction(rate, 100), Fraction(noise, 4), steps + 20)
    assert base <= poisson(Fraction(2 * rate, 100), Fraction(noise, 4), steps)
    assert base <= poisson(Fraction(rate, 100), Fraction(noise, 5), steps)
    smaller = {(Fraction(rate, 100), Fraction(noise, 4)): steps}
    assert base <= poisson_epsilon(smaller, delta=DELTA / 100)


@pytest.mark.parametrize(("rate", "noise", "steps"), SCHEDULES[:4])
def test_opacus_agrees_as_a_second_and_third_opinion(rate, noise, steps):
    accountants = pytest.importorskip("opacus.accountants")
    history = [(float(noise), float(rate), steps)]
    ours = poisson(rate, noise, steps)
    second, third = accountants.PRVAccountant(), accountants.RDPAccountant()
    second.history = third.history = history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus remarks on its own numerics
        by_prv, by_rdp = second.get_epsilon(delta=float(DELTA)), third.get_epsilon(delta=float(DELTA))
    # PRV states its own error of 0.01 on top.
    assert abs(by_prv - ours - 0.01) <= 0.02
    assert ours <= by_rdp + 1e-3


def test_the_gaussian_approximation_understates_and_is_not_what_we_return():
    accountants = pytest.importorskip("opacus.accountants")
    with pytest.warns(UserWarning, match="can underestimate"):
        approximate = accountants.GaussianAccountant()
    approximate.history = [(1.0, 0.05, 500)]
    assert approximate.get_epsilon(delta=1e-5) == pytest.approx(6.858, abs=1e-2)
    assert poisson("0.05", "1", 500) > 7.5


def test_steps_of_several_kinds_add_up_in_any_order():
    kinds = [((Fraction(1, 10), Fraction(2)), 5), ((Fraction(1, 5), Fraction(3)), 7)]
    together = poisson_epsilon(dict(kinds), delta=DELTA)
    assert together == poisson_epsilon(dict(reversed(kinds)), delta=DELTA)
    assert together > max(poisson_epsilon(dict([kind]), delta=DELTA) for kind in kinds)


@pytest.fixture
def forget():
    """Nothing computed by a mutant may be remembered elsewhere."""
    accounting._poisson_epsilon.cache_clear()
    yield
    accounting._poisson_epsilon.cache_clear()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.5, math.inf, math.nan])
@pytest.mark.usefixtures("forget")
def test_a_loss_distribution_that_is_off_is_not_believed(monkeypatch, epsilons, schedule, factor):
    class Mutant:
        def __init__(self, *_, **__):
            pass

        def compose(self, event):
            pass

        def get_epsilon(self, _):
            return epsilons[schedule] * factor

    monkeypatch.setattr(accounting, "PLDAccountant", Mutant)
    with pytest.raises(PlanRefused, match=r"accountants disagree: .* refused until they agree"):
        poisson(*schedule)


@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 2.0])
@pytest.mark.usefixtures("forget")
def test_a_renyi_bound_that_is_off_is_not_believed(monkeypatch, factor):
    truly = accounting._renyi_epsilon
    monkeypatch.setattr(accounting, "_renyi_epsilon", lambda events, delta: factor * truly(events, delta))
    with pytest.raises(PlanRefused, match=r"accountants disagree: .* refused until they agree"):
        poisson(Fraction(3, 10), Fraction(29, 10), 3)


@pytest.mark.parametrize(("rate", "steps", "epsilon"), [("1/5", 40, 2)])
def test_the_least_noise_is_enough_and_a_step_less_is_not(rate, steps, epsilon):
    noise = poisson_noise_multiplier(sampling_rate=Fraction(rate), steps=steps, epsilon=Fraction(epsilon), delta=DELTA)
    assert poisson(rate, noise, steps) <= epsilon < poisson(rate, noise - Fraction(1, 2**9), steps)


def test_an_epsilon_that_no_noise_reaches_is_refused():
    with pytest.raises(PlanRefused, match="needs noise beyond any use"):
        poisson_noise_multiplier(sampling_rate=Fraction(1), steps=10_000, epsilon=Fraction(1, 10**4), delta=MIN_DELTA)


# --- what is shown ------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e6))
def test_printed_numbers_never_understate_and_have_two_decimals(epsilon):
    shown = Fraction(printed(epsilon))
    assert Fraction(repr(epsilon)) <= shown < Fraction(repr(epsilon)) + Fraction(1, 100)


@pytest.mark.parametrize(
    ("epsilon", "shown"),
    [(0.0, "0.00"), (1e-12, "0.01"), (1.1, "1.10"), (1.001, "1.01"), (2.0, "2.00"), (2.0000000001, "2.01")],
)
def test_printed_by_hand(epsilon, shown):
    assert printed(epsilon) == shown


def test_an_infinite_epsilon_is_printed_as_such():
    assert printed(math.inf) == "inf"


@given(st.floats(0.01, 200), deltas, st.floats(1e-4, 1 - 1e-4))
def test_the_strongest_attack_bound_dominates_the_best_attack_on_the_gaussian(epsilon, delta, false_positive_rate):
    # Neyman and Pearson's test against noise of exactly this (epsilon, delta): TPR = Phi(Phi^-1(FPR) + mu).
    low, high = 1e-9, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = gaussian_delta(epsilon, rho=Fraction(middle**2 / 2)) <= float(delta)
        low, high = (middle, high) if enough else (low, middle)
    best = norm.cdf(norm.ppf(false_positive_rate) + low)
    assert strongest_attack(epsilon, delta=delta, false_positive_rate=false_positive_rate) >= best - 1e-9


@given(st.floats(0, 1e6), deltas, st.floats(0, 1))
def test_the_strongest_attack_is_a_rate_and_no_worse_than_guessing(epsilon, delta, false_positive_rate):
    bound = strongest_attack(epsilon, delta=delta, false_positive_rate=false_positive_rate)
    assert min(1.0, false_positive_rate) <= bound + 1e-12
    assert bound <= 1.0


def test_without_any_privacy_loss_an_attacker_can_only_guess():
    assert strongest_attack(0.0, delta=DELTA, false_positive_rate=0.3) == pytest.approx(0.3 + 1e-5)


def test_accounting_uses_no_randomness():
    random.seed(1)
    first = zcdp_epsilon(Fraction(1, 3), delta=DELTA)
    random.seed(2)
    assert zcdp_epsilon(Fraction(1, 3), delta=DELTA) == first
