"""Accountants against chance: epsilon may never be below what a Monte-Carlo estimate finds, nor far above it."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedgrade.privacy.accounting import poisson_epsilon, zcdp_epsilon
from tests.benchmarks.monte_carlo import discrete_gaussian, draw_losses, sampled_gaussian

SAMPLES = 10_000
ERRORS = 5.0  # standard errors: by chance once in 3.5 million comparisons
# How far the distribution may overstate epsilon: its interval at every step, and the bins of the estimate.
SLACK, PART = 0.02, 0.02
# zCDP loses up to a fifth by its conversion; the product's own gate says so, too.
ZCDP_SLACK, ZCDP_PART = 0.05, 0.2
EXAMPLES = 150

GOLDEN = (
    ("0.05", "1", 500, 7.5237),
    ("0.01", "1", 1000, 1.8282),
    ("0.1", "4", 400, 2.0706),
    ("0.25", "8", 200, 1.7652),
    ("1", "10", 50, 2.9432),
    ("0.05", "0.6", 100, 11.506),
    ("0.5", "40", 100, 0.4354),
)

rates = st.integers(1, 100).map(lambda percent: Fraction(percent, 100))
noises = st.integers(40, 2000).map(lambda part: Fraction(part, 64))
deltas = st.integers(30, 70).map(lambda power: Fraction(10 ** (-power / 10)).limit_denominator(10**9))
soak = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def estimates(step, *, steps, epsilon, seed):
    """Losses near ``epsilon`` in both directions of adjacency."""
    rng = np.random.default_rng(seed)
    return [draw_losses(one, steps=steps, epsilon=epsilon, samples=SAMPLES, rng=rng) for one in (step, step.reversed())]


def never_below(losses, *, epsilon, delta):
    for one in losses:
        found = one.delta(epsilon)
        assert found.mean - ERRORS * found.error <= float(delta), (epsilon, found)


def not_far_above(losses, *, epsilon, delta):
    found = [one.delta(max(0.0, epsilon)) for one in losses]
    assert epsilon <= 0 or max(one.mean + ERRORS * one.error for one in found) >= float(delta), (epsilon, found)


def slow(row):
    return pytest.param(*row, marks=pytest.mark.slow)


@pytest.mark.parametrize(("rate", "noise", "steps", "printed"), [*GOLDEN[:3], *map(slow, GOLDEN[3:])])
def test_chance_agrees_with_the_golden_table(rate, noise, steps, printed):
    delta = Fraction(1, 10**5)
    losses = estimates(sampled_gaussian(float(rate), float(noise)), steps=steps, epsilon=printed, seed=steps)
    never_below(losses, epsilon=printed + 1e-4, delta=delta)
    assert max(one.epsilon(float(delta), errors=ERRORS) for one in losses) >= printed - SLACK
    assert poisson_epsilon({(Fraction(rate), Fraction(noise)): steps}, delta=delta) == pytest.approx(printed, abs=1e-3)


@pytest.mark.slow
def test_sampled_steps_cost_what_chance_finds(publish):
    compared = []

    @soak
    @given(rates, noises, st.integers(1, 400), deltas, st.integers(0, 2**32))
    def compare(rate, noise, steps, delta, seed):
        # A rough guess keeps out what costs next to nothing or next to everything.
        assume(0.05 <= float(rate / noise) * steps**0.5 <= 4)
        epsilon = poisson_epsilon({(rate, noise): steps}, delta=delta)
        assume(0.02 <= epsilon <= 30)
        losses = estimates(sampled_gaussian(float(rate), float(noise)), steps=steps, epsilon=epsilon, seed=seed)
        never_below(losses, epsilon=epsilon, delta=delta)
        not_far_above(losses, epsilon=epsilon * (1 - PART) - SLACK, delta=delta)
        compared.append((epsilon, max(one.epsilon(float(delta)) for one in losses)))

    compare()
    publish("sampled", figures("Poisson-sampled schedules, by dp-accounting's privacy loss distribution", compared))


@pytest.mark.slow
def test_integer_noise_costs_no_more_than_zcdp_says(publish):
    compared = []

    @soak
    @given(st.integers(1, 8), st.integers(1, 200), st.integers(1, 200), deltas, st.integers(0, 2**32))
    def compare(sensitivity, scale, steps, delta, seed):
        rho, step = Fraction(steps * sensitivity**2, 2 * scale**2), discrete_gaussian(sensitivity, scale)
        assume(Fraction(1, 10**4) <= rho <= 20)
        epsilon = zcdp_epsilon(rho, delta=delta)
        assume(epsilon >= 0.02)
        losses = estimates(step, steps=steps, epsilon=epsilon, seed=seed)
        never_below(losses, epsilon=epsilon, delta=delta)
        compared.append((epsilon, max(one.epsilon(float(delta)) for one in losses)))
        # The coarsest noise hides more than its rho says, which is no one's loss: only finer noise has to be tight.
        if scale >= 10 * sensitivity:
            floor = (epsilon - ZCDP_SLACK - 5 * float(delta)) / (1 + ZCDP_PART)
            near = estimates(step, steps=steps, epsilon=max(floor, 1e-3), seed=seed)
            not_far_above(near, epsilon=floor, delta=delta)

    compare()
    publish("integer", figures("schedules of integer noise, by zero-concentrated differential privacy", compared))


def figures(what, compared):
    """How far the printed epsilon is above what chance finds; beyond the estimate's error it is never below."""
    stated, found = np.array(compared).T
    above = np.sort(stated - found)
    share = np.sort((stated - found) / stated)
    setup = (
        f"{len(compared)} random {what}, against {SAMPLES} weighted samples each, in both directions of adjacency; "
        f"delta 1e-3 to 1e-7, epsilon {stated.min():.2f} to {stated.max():.1f}."
    )
    return [
        setup,
        "",
        "| stated epsilon less the one found | least | median | most |",
        "|---|---|---|---|",
        f"| absolute | {above[0]:.4f} | {np.median(above):.4f} | {above[-1]:.4f} |",
        f"| as a part of it | {share[0]:.4f} | {np.median(share):.4f} | {share[-1]:.4f} |",
        "",
        f"Never below by more than {ERRORS:g} standard errors of the estimate.",
    ]


def test_an_accountant_that_is_off_by_a_tenth_is_noticed():
    losses = estimates(sampled_gaussian(0.05, 1.0), steps=500, epsilon=7.5237, seed=1)
    with pytest.raises(AssertionError):
        never_below(losses, epsilon=0.9 * 7.5237, delta=Fraction(1, 10**5))
    with pytest.raises(AssertionError):
        not_far_above(losses, epsilon=1.1 * 7.5237, delta=Fraction(1, 10**5))
