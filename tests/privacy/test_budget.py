from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedgrade.errors import BudgetExceeded, DocumentRefused, PlanRefused
from fedgrade.privacy.accounting import gaussian_delta, poisson_epsilon, zcdp_epsilon, zcdp_rho
from fedgrade.privacy.budget import Ceiling, Spending, charge_all, require_within
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import AccountKey, DiscreteGaussian, PoissonGaussian, Reserve

DELTA = Fraction(1, 10**5)
ACCOUNT = AccountKey(partner=SiteId("site-1"), lineage="panels", cohort="2026-06", partition="train")
SGD = PoissonGaussian(sampling_rate=Fraction(1, 2), noise_multiplier=Fraction(20), steps=3, planned_steps=9)

gaussians = st.builds(DiscreteGaussian, sensitivity=st.integers(1, 2**20), scale=st.integers(2**18, 2**30))
accounts = st.builds(
    AccountKey,
    partner=st.just(SiteId("site-1")),
    lineage=st.sampled_from(["panels", "phones"]),
    cohort=st.sampled_from(["2026-05", "2026-06"]),
    partition=st.sampled_from(["train", "test"]),
)


def spending_by_account(entries):
    spending = {}
    for entry in entries:
        charge_all(spending, entry)
    return spending


def reserve(mechanism, *, account=ACCOUNT, job="a", attempt=0):
    return Reserve(
        job=job,
        round_index=0,
        attempt=attempt,
        purpose="train",
        accounts=(account,),
        mechanism=mechanism,
        weights_digest="b" * 64,
        epsilon_limit=Fraction(8),
        delta=DELTA,
    )


reservations = st.lists(st.builds(reserve, gaussians, account=accounts, job=st.sampled_from("ab")), max_size=8)


def spent(*mechanisms, job="a"):
    spending = Spending()
    for mechanism in mechanisms:
        spending = spending.charged(mechanism, job=job)
    return spending


@given(reservations, st.randoms(use_true_random=False))
def test_what_an_account_has_spent_does_not_depend_on_the_order_of_charges(entries, random):
    shuffled = list(entries)
    random.shuffle(shuffled)
    one, other = spending_by_account(entries), spending_by_account(shuffled)
    assert {key: spending.rho for key, spending in one.items()} == {key: item.rho for key, item in other.items()}


@given(reservations, st.integers(0, 8))
def test_spending_is_a_fold_so_that_a_restart_changes_nothing(entries, stop):
    at_once = spending_by_account(entries)
    before = spending_by_account(entries[:stop])
    for entry in entries[stop:]:
        charge_all(before, entry)
    assert before == at_once


@given(reservations)
def test_every_charge_lands_on_exactly_one_account(entries):
    total = sum((spending.rho for spending in spending_by_account(entries).values()), Fraction(0))
    assert total == sum((entry.mechanism.rho for entry in entries), Fraction(0))


@given(st.lists(gaussians, max_size=6), gaussians)
def test_a_further_release_never_costs_less(mechanisms, further):
    before, after = spent(*mechanisms), spent(*mechanisms, further)
    for composition in ("zcdp", "mixed"):
        low, high = (spending.epsilon(delta=DELTA, composition=composition) for spending in (before, after))
        assert low <= high * (1 + 1e-9)


@given(st.lists(gaussians, max_size=6))
def test_a_mixed_account_never_shows_less_than_a_zcdp_account(mechanisms):
    spending = spent(*mechanisms)
    assert spending.epsilon(delta=DELTA, composition="mixed") >= spending.epsilon(delta=DELTA, composition="zcdp")


def test_runs_and_models_share_one_account():
    one = DiscreteGaussian(sensitivity=1, scale=10)
    together = spending_by_account([reserve(one, job="a"), reserve(one, job="b")])
    assert together[ACCOUNT].rho == 2 * one.rho
    epsilon = together[ACCOUNT].epsilon(delta=DELTA, composition="zcdp")
    assert epsilon == zcdp_epsilon(2 * one.rho, delta=DELTA) > zcdp_epsilon(one.rho, delta=DELTA)


def test_a_retry_is_charged_again():
    one = DiscreteGaussian(sensitivity=1, scale=10)
    assert spending_by_account([reserve(one), reserve(one, attempt=1)])[ACCOUNT].rho == 2 * one.rho


def test_cohorts_compose_in_parallel_so_that_each_pays_the_whole_cost_and_no_item_pays_twice():
    """Second method: by brute force, an item's exact loss is that of the releases its own cohort was in."""
    one, later = DiscreteGaussian(sensitivity=1, scale=10), replace(ACCOUNT, cohort="2026-07")
    both = replace(reserve(one), accounts=(ACCOUNT, later))
    spending = spending_by_account([reserve(one), both, both])
    releases = [{ACCOUNT.cohort}, {ACCOUNT.cohort, later.cohort}, {ACCOUNT.cohort, later.cohort}]
    for account in (ACCOUNT, later):
        times = sum(account.cohort in cohorts for cohorts in releases)
        # The loss of N(0, s^2 I) between neighbours that differ in every release the item is in: ||1||^2 / 2 s^2.
        shift = np.ones(times) / one.scale
        assert spending[account].rho == times * one.rho == pytest.approx(float(shift @ shift) / 2)


@pytest.mark.parametrize(
    "accounts",
    [(), (ACCOUNT, ACCOUNT), (ACCOUNT, replace(ACCOUNT, cohort="other", partition="test"))],
    ids=["none", "one twice", "both sides"],
)
def test_a_charge_names_different_cohorts_of_one_side(accounts):
    with pytest.raises(DocumentRefused, match="must be one side of one data lineage"):
        replace(reserve(DiscreteGaussian(sensitivity=1, scale=10)), accounts=accounts)


def test_nothing_spent_is_nothing():
    assert spending_by_account([]) == {}
    for composition in ("zcdp", "mixed"):
        assert Spending().epsilon(delta=DELTA, composition=composition) == 0.0


def test_charging_leaves_the_spending_before_it_as_it_was():
    before = spent(SGD)
    after = before.charged(SGD, job="a").charged(SGD, job="b")
    assert before == spent(SGD)
    assert [(paid.job, paid.planned_steps, paid.charged_steps) for paid in after.poisson] == [("a", 9, 6), ("b", 9, 3)]


def test_a_poisson_job_is_paid_for_whole_with_its_first_round():
    whole = poisson_epsilon({(SGD.sampling_rate, SGD.noise_multiplier): 9}, delta=DELTA / 4)
    for rounds in (1, 2, 3):
        assert spent(*[SGD] * rounds).epsilon(delta=DELTA, composition="mixed") == whole


def test_a_round_beyond_the_plan_is_a_job_of_its_own_with_the_next_share_of_delta():
    spending = spent(SGD, SGD, SGD, SGD, SGD)
    assert [(paid.planned_steps, paid.charged_steps) for paid in spending.poisson] == [(9, 9), (3, 3), (3, 3)]
    rates = (SGD.sampling_rate, SGD.noise_multiplier)
    parts = [poisson_epsilon({rates: steps}, delta=DELTA / share) for steps, share in ((9, 4), (3, 8), (3, 16))]
    assert spending.epsilon(delta=DELTA, composition="mixed") == pytest.approx(sum(parts), rel=1e-12)


def test_rounds_of_jobs_side_by_side_fill_each_jobs_own_plan():
    spending = spent(SGD).charged(SGD, job="b").charged(SGD, job="a").charged(SGD, job="b")
    assert [(paid.job, paid.charged_steps) for paid in spending.poisson] == [("a", 6), ("b", 6)]


@pytest.mark.parametrize(
    "other",
    [
        replace(SGD, noise_multiplier=Fraction(19)),
        replace(SGD, sampling_rate=Fraction(1, 3)),
        replace(SGD, planned_steps=6),
    ],
)
def test_no_other_mechanism_draws_on_what_a_plan_paid_for(other):
    spending = spent(SGD, other)
    assert [paid.charged_steps for paid in spending.poisson] == [3, 3]
    assert spending.poisson[1].planned_steps == other.planned_steps


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=6), st.sampled_from("abc"))
def test_a_further_poisson_round_never_costs_less_and_its_job_never_costs_more_than_was_fixed(jobs, further):
    spending = Spending()
    for job in jobs:
        spending = spending.charged(SGD, job=job)
    after = spending.charged(SGD, job=further)
    fixed = [(paid.job, paid.sampling_rate, paid.noise_multiplier, paid.planned_steps) for paid in after.poisson]
    assert fixed[: len(spending.poisson)] == [
        (paid.job, paid.sampling_rate, paid.noise_multiplier, paid.planned_steps) for paid in spending.poisson
    ]
    assert sum(paid.charged_steps for paid in after.poisson) == 3 * (len(jobs) + 1)
    low, high = (one.epsilon(delta=DELTA, composition="mixed") for one in (spending, after))
    assert low <= high


def delta_of_the_best_moment_to_stop(epsilons, noise):
    """The exact delta of a coordinator who abandons a job after the round n that suits it, at the n-th of ``epsilons``.

    Second method: one step on everyone adds N(1/2 noise², 1/noise²) to the privacy loss; whether to go on is decided
    backwards from the last round, by which of the two keeps the greater excess over what was charged.
    """
    shift = 1 / noise
    losses = np.linspace(-5.0, 7.0, 2401)
    width = losses[1] - losses[0]
    moves = np.arange(-int(8 * shift / width), int(8 * shift / width) + 1) * width
    masses = norm.pdf(moves, loc=shift**2 / 2, scale=shift)
    masses /= masses.sum()
    pad = len(moves) // 2
    value = np.zeros_like(losses)
    for epsilon in reversed(epsilons):
        value = np.maximum(value, np.maximum(0.0, 1 - np.exp(epsilon - losses)))
        value = np.convolve(np.pad(value, pad, mode="edge"), masses[::-1], "valid")
    return float(np.interp(0.0, losses, value))


def test_abandoning_a_job_at_the_moment_that_suits_the_coordinator_gains_nothing():
    noise, rounds, share = 18, 60, float(DELTA / 4)
    step = PoissonGaussian(sampling_rate=Fraction(1), noise_multiplier=Fraction(noise), steps=1, planned_steps=rounds)
    spending, charged, as_they_ran = Spending(), [], []
    for number in range(1, rounds + 1):
        spending = spending.charged(step, job="a")
        charged.append(spending.epsilon(delta=DELTA, composition="mixed"))
        rho = Fraction(number, 2 * noise**2)
        as_they_ran.append(brentq(lambda epsilon, rho=rho: gaussian_delta(epsilon, rho=rho) - share, 0.0, 50.0))
    assert delta_of_the_best_moment_to_stop(charged, noise) <= share * 1.01
    # Not idle: had only the rounds that ran been charged, the same coordinator would break its delta tenfold.
    assert delta_of_the_best_moment_to_stop(as_they_ran, noise) > 8 * share


def test_jobs_of_a_mixed_account_add_up_at_deltas_that_together_stay_below_the_accounts():
    integer = DiscreteGaussian(sensitivity=1, scale=10)
    spending = spent(integer, SGD).charged(SGD, job="b")
    steps = {(SGD.sampling_rate, SGD.noise_multiplier): 9}
    parts = (
        zcdp_epsilon(integer.rho, delta=DELTA / 2),
        poisson_epsilon(steps, delta=DELTA / 4),
        poisson_epsilon(steps, delta=DELTA / 8),
    )
    assert spending.epsilon(delta=DELTA, composition="mixed") == pytest.approx(sum(parts), rel=1e-12)


def test_poisson_jobs_do_not_enter_a_zcdp_account():
    with pytest.raises(PlanRefused, match="opened as mixed"):
        spent(SGD).epsilon(delta=DELTA, composition="zcdp")


def test_a_mixed_account_ends_when_its_shares_of_delta_do():
    spending = Spending()
    for number in range(13):  # 1e-5 / 2^14 is below 1e-9
        spending = spending.charged(SGD, job=str(number))
    with pytest.raises(PlanRefused, match="delta"):
        spending.epsilon(delta=DELTA, composition="mixed")


@settings(max_examples=50)
@given(st.fractions(min_value=Fraction(1, 100), max_value=20), st.integers(1, 400))
def test_charging_until_refused_never_passes_the_ceiling(limit, scale):
    ceiling = Ceiling(epsilon=limit, delta=DELTA, composition="zcdp")
    mechanism = DiscreteGaussian(sensitivity=1, scale=scale)
    allowed = zcdp_rho(limit, delta=DELTA) // mechanism.rho
    within = Spending(rho=mechanism.rho * allowed)
    require_within(within, ceiling=ceiling, account=ACCOUNT)
    assert within.epsilon(delta=DELTA, composition="zcdp") <= limit
    with pytest.raises(BudgetExceeded):
        require_within(within.charged(mechanism, job="a").charged(mechanism, job="a"), ceiling=ceiling, account=ACCOUNT)


def test_a_ceiling_that_is_met_exactly_holds_and_a_hair_more_does_not():
    spending = Spending(rho=Fraction(1, 10))
    exactly = Fraction(spending.epsilon(delta=DELTA, composition="zcdp"))
    require_within(spending, ceiling=Ceiling(epsilon=exactly, delta=DELTA, composition="zcdp"), account=ACCOUNT)
    less = Ceiling(epsilon=exactly - Fraction(1, 10**18), delta=DELTA, composition="zcdp")
    with pytest.raises(BudgetExceeded):
        require_within(spending, ceiling=less, account=ACCOUNT)


def test_a_refusal_names_the_account_the_sum_and_the_limit():
    ceiling = Ceiling(epsilon=Fraction(1), delta=DELTA, composition="zcdp")
    with pytest.raises(
        BudgetExceeded,
        match=r"site-1/panels/2026-06/train: epsilon would reach 1\.92, the partner's ceiling is 1\.00; lower",
    ):
        require_within(Spending(rho=Fraction(1, 10)), ceiling=ceiling, account=ACCOUNT)


def test_a_hostile_charge_exceeds_every_ceiling_instead_of_overflowing():
    spending = spent(DiscreteGaussian(sensitivity=10**300, scale=1))
    ceiling = Ceiling(epsilon=Fraction(10**6), delta=DELTA, composition="zcdp")
    with pytest.raises(BudgetExceeded, match="would reach inf"):
        require_within(spending, ceiling=ceiling, account=ACCOUNT)
