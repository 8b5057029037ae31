"""One schedule, four accountants and chance: how far apart their epsilons are, and what each takes."""

import time
import warnings
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from monte_carlo import draw_losses, sampled_gaussian
from opacus.accountants import PRVAccountant
from opacus.accountants import RDPAccountant as OpacusRenyi

from fedgrade.privacy import accounting
from fedgrade.privacy.accounting import poisson_epsilon

DELTA = Fraction(1, 10**5)
SAMPLES = 20_000
# Sampling rate, noise multiplier, steps.
SCHEDULES = (
    ("0.05", "1", 500),
    ("0.01", "1", 1000),
    ("0.1", "4", 400),
    ("0.25", "8", 200),
    ("1", "10", 50),
    ("0.05", "0.6", 100),
    ("0.5", "40", 100),
)
Schedule = tuple[Fraction, Fraction, int]


def accountants() -> str:
    """A table of epsilons and seconds."""
    lines = [
        "| rate, noise, steps | fedgrade (PLD) | dp-accounting RDP | Opacus PRV | Opacus RDP | Monte Carlo |",
        "|---|---|---|---|---|---|",
    ]
    for rate, noise, steps in SCHEDULES:
        schedule = (Fraction(rate), Fraction(noise), steps)
        poisson_epsilon({(Fraction(1, 2), Fraction(1)): 1}, delta=DELTA)  # imports and caches, once
        cells = [_timed(way, schedule) for way in (_product, _renyi, _prv, _opacus_renyi, _chance)]
        lines.append(f"| {rate}, {noise}, {steps} | " + " | ".join(cells) + " |")
    setup = (
        "Epsilon at delta 1e-5, add or remove one item, and seconds. *fedgrade* includes its gate: the privacy loss "
        "distribution must not exceed the Rényi bound. Opacus' PRV adds an error bound of 0.01 to what it finds. Monte "
        f"Carlo: {SAMPLES:,} weighted samples, tails cut and outcomes in bins, so that it can only find too little; "
        "with its standard error."
    )
    return "\n".join([setup, "", *lines])


def _timed(way: Callable[[Schedule], str], schedule: Schedule) -> str:
    began = time.perf_counter()
    found = way(schedule)
    return f"{found} ({time.perf_counter() - began:.2f} s)"


def _product(schedule: Schedule) -> str:
    rate, noise, steps = schedule
    accounting._poisson_epsilon.cache_clear()
    accounting._renyi_epsilon.cache_clear()
    return f"**{poisson_epsilon({(rate, noise): steps}, delta=DELTA):.4f}**"


def _renyi(schedule: Schedule) -> str:
    accounting._renyi_epsilon.cache_clear()
    return f"{accounting._renyi_epsilon((schedule,), DELTA):.4f}"


def _prv(schedule: Schedule) -> str:
    return f"{_opacus(PRVAccountant(), schedule):.4f}"


def _opacus_renyi(schedule: Schedule) -> str:
    return f"{_opacus(OpacusRenyi(), schedule):.4f}"


def _opacus(accountant: PRVAccountant | OpacusRenyi, schedule: Schedule) -> float:
    rate, noise, steps = schedule
    accountant.history = [(float(noise), float(rate), steps)]
    with warnings.catch_warnings():
        # It says where its grid of orders ends and where it takes logarithms of zero; the table shows what comes of it.
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(float(DELTA)))


def _chance(schedule: Schedule) -> str:
    rate, noise, steps = schedule
    step, rng = sampled_gaussian(float(rate), float(noise)), np.random.default_rng(0)
    # The tilt needs a guess of the answer; a rough one costs nothing but samples.
    guess = accounting._renyi_epsilon((schedule,), DELTA)
    for _ in range(2):
        losses = [
            draw_losses(one, steps=steps, epsilon=guess, samples=SAMPLES, rng=rng) for one in (step, step.reversed())
        ]
        found = max(losses, key=lambda one: one.epsilon(float(DELTA)))
        guess = found.epsilon(float(DELTA))
    error = (found.epsilon(float(DELTA), errors=1.0) - found.epsilon(float(DELTA), errors=-1.0)) / 2
    return f"{guess:.4f} ± {error:.4f}"
