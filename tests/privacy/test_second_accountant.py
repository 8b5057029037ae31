"""Integer noise is believed only when a privacy loss distribution says the same."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from fedgrade.errors import PlanRefused
from fedgrade.privacy import accounting
from fedgrade.privacy.accounting import MIN_DELTA, confirmed_epsilon, gaussian_delta, zcdp_epsilon
from fedgrade.privacy.budget import Spending
from fedgrade.privacy.plan import DistributedSpec, LocalSgdSpec, LocalSpec, calibrate

DELTA = Fraction(1, 10**5)
LOCAL = LocalSpec(
    target_epsilon=4.0, delta=1e-5, evaluation_epsilon=2.0, centre_share=0.1, rounds=60, max_grad_norm=1.0
)
SPECS = (
    LOCAL,
    DistributedSpec(
        target_epsilon=2.0, floor_epsilon=8.0, delta=1e-5, evaluation_epsilon=2.0, centre_share=0.1, rounds=60,
        max_grad_norm=1.0,
    ),
    LocalSgdSpec(
        target_epsilon=4.0, delta=1e-5, evaluation_epsilon=2.0, centre_share=0.1, rounds=2, max_grad_norm=1.0,
        sampling_rate=0.5, local_steps=2, learning_rate=2.0,
    ),
)  # fmt: skip


class Fixed:
    """An accountant that has made up its mind."""

    answer = 0.0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def compose(self, event):
        pass

    def get_epsilon(self, _):
        return self.answer


@pytest.fixture
def forget():
    """Nothing confirmed in one test may be remembered in another."""
    confirmed_epsilon.cache_clear()
    yield
    confirmed_epsilon.cache_clear()


@settings(max_examples=12)
@given(
    st.floats(-20.0, 9.9).map(lambda power: Fraction(2.0**power)),
    st.floats(1.0, 9.0).map(lambda power: max(Fraction(10**-power), MIN_DELTA)),
)
@example(Fraction(1, 16), Fraction(1, 100))
@example(Fraction(2), Fraction(1, 10))
@example(Fraction(1000), MIN_DELTA)
def test_the_gate_lets_through_every_cost_that_a_job_can_have(rho, delta):
    assert confirmed_epsilon(rho, delta=delta) == zcdp_epsilon(rho, delta=delta)


@pytest.mark.parametrize("rho", [Fraction(1, 100), Fraction(1, 4), Fraction(3)])
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.5])
@pytest.mark.usefixtures("forget")
def test_a_conversion_that_is_off_by_a_fraction_is_refused(monkeypatch, rho, factor):
    exact = brentq(lambda epsilon: gaussian_delta(epsilon, rho=rho) - float(DELTA), 0.0, 100.0)
    monkeypatch.setattr(accounting, "zcdp_epsilon", lambda _, **__: exact * factor)
    with pytest.raises(PlanRefused, match="accountants disagree"):
        confirmed_epsilon(rho, delta=DELTA)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.mode)
@pytest.mark.parametrize("answer", [0.0, float("inf"), float("nan")])
@pytest.mark.usefixtures("forget")
@pytest.mark.no_cover
def test_no_job_escapes_the_second_accountant(monkeypatch, spec, answer):
    calibrate(spec, participants=3)  # Poisson steps, which have a gate of their own, are remembered from here
    confirmed_epsilon.cache_clear()
    monkeypatch.setattr(accounting, "PLDAccountant", type("Stubborn", (Fixed,), {"answer": answer}))
    with pytest.raises(PlanRefused, match="accountants disagree"):
        calibrate(spec, participants=3)


def test_training_and_held_out_items_are_both_gated(monkeypatch):
    asked = []

    def watch(rho, *, delta):
        asked.append((rho, delta))
        return confirmed_epsilon(rho, delta=delta)

    monkeypatch.setattr("fedgrade.privacy.plan.confirmed_epsilon", watch)
    plan = calibrate(LOCAL, participants=3)
    assert asked == [(plan.charge_training(Spending(), job="any").rho, DELTA), (plan.evaluate.rho, DELTA)]
