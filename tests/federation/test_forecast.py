"""A forecast against what then happens: real sites that refuse or take part, and the verifier's own numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrade.data.manifest import write_manifest
from fedgrade.evaluation import ConfusionCounts, metrics
from fedgrade.federation.forecast import (
    Standing,
    forecast,
    held_out_items,
    latest_counts,
    metrics_forecast,
    plausible_counts,
    strongest_attacks,
    training_path,
)
from fedgrade.federation.messages import Refusal
from fedgrade.federation.site_proof import prove_site
from fedgrade.federation.verification import verify_federation
from fedgrade.grading import GradeScale
from fedgrade.job import plan_job
from fedgrade.privacy.accounting import strongest_attack
from fedgrade.privacy.grid import from_grid
from fedgrade.privacy.noise import discrete_gaussian
from fedgrade.privacy.plan import DistributedSpec, LocalSgdSpec, calibrate
from fedgrade.trust.records import DiscreteGaussian
from tests.federation.small_federation import (
    DECLARED,
    NAMES,
    POLICY,
    SCALE,
    SPEC,
    with_privacy,
    write_photos,
)

ITEMS = dict.fromkeys(NAMES, DECLARED)
DISTRIBUTED = DistributedSpec(
    target_epsilon=2.0, floor_epsilon=8.0, delta=1e-5, evaluation_epsilon=2.0, centre_share=0.1, rounds=3,
    max_grad_norm=1.0,
)  # fmt: skip
SHARED = replace(SPEC, privacy=DISTRIBUTED, aggregation=replace(SPEC.aggregation, method="secure_sum"))
SGD = LocalSgdSpec(
    target_epsilon=4.0, delta=1e-5, evaluation_epsilon=2.0, centre_share=0.1, rounds=3, max_grad_norm=1.0,
    sampling_rate=0.5, local_steps=2, learning_rate=1.0,
)  # fmt: skip
EVALUATION = calibrate(SPEC.privacy, participants=3).evaluate


def standings(federation, policy=POLICY):
    """Every site as its own files have it."""
    return {
        name: Standing(
            policy=policy,
            proof=prove_site(federation.ledger(name), site=name, roster=federation.roster)
            if federation.ledger(name).exists()
            else None,
            lineage=f"squares-{name}",
            cohorts={"2026": DECLARED},
        )
        for name in NAMES
    }


def assert_foretold(forecasted, proof):
    """Every number of the forecast, as the verifier has it afterwards; the same to the last bit."""
    observers = proof.jobs[forecasted.job.digest].observers
    for site in forecasted.sites:
        ledger = proof.sites[site.site]
        for account in (*site.training, *site.held_out):
            partition = account.account.partition
            assert account.alone == ledger.job_epsilon(forecasted.job.digest, partition=partition)
            assert account.after == ledger.accounts[account.account].epsilon
        assert site.observers == observers[site.site]


@pytest.mark.usefixtures("quick")
def test_what_is_foretold_is_what_the_verifier_proves_job_after_job(federation):
    for nonce, rounds in (("first", 2), ("second", 1)):
        job = federation.job(with_privacy(rounds=rounds, target_epsilon=20.0), nonce=nonce)
        forecasted = forecast(job, standings=standings(federation))
        assert forecasted.runs
        assert forecasted.willing == NAMES
        federation.run_in_process(job)
        assert_foretold(forecasted, verify_federation(federation.root))


@pytest.mark.usefixtures("quick")
def test_a_ledger_alone_foretells_the_same_as_the_sites_own_files(federation):
    federation.run_in_process(federation.job(with_privacy(rounds=1)))
    job = federation.job(with_privacy(rounds=1), nonce="next")
    copies = {name: Standing.of_ledger(one.proof, policy=None) for name, one in standings(federation).items()}
    for own, copied in zip(
        forecast(job, standings=standings(federation)).sites, forecast(job, standings=copies).sites, strict=True
    ):
        assert (own.training, own.held_out, own.observers) == (copied.training, copied.held_out, copied.observers)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modes": ("distributed",)},
        {"maximum_rounds": 1},
        {"minimum_participants": 4},
        {"minimum_items": 9},
        {"backbones": ("resnet18",)},
        {"epsilon_per_job": 39.0},
        {"epsilon_limit": 39.0},
        {"epsilon_limit": 60.0},
        {"delta": 1e-6},
        {"modes": ("local", "local_sgd")},
    ],
    ids=str,
)
def test_a_site_says_exactly_what_the_forecast_said_it_would(federation, changes):
    federation.run_in_process(federation.job(with_privacy(rounds=1)))
    policy = replace(POLICY, **changes)
    job = federation.job(nonce="next")
    foretold = forecast(job, standings=standings(federation, policy)).sites[0].refusals
    with federation.site(policy=policy) as site:
        body = federation.opened(site.answer(federation.admission(job))).document.body
    assert isinstance(body, Refusal) == bool(foretold)
    if foretold:
        assert body.reason in foretold


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("later", [4, 8])
def test_cohorts_too_small_to_pay_alone_are_foretold_as_the_site_says_it(federation, later):
    federation.run_in_process(federation.job(with_privacy(rounds=1)))
    folder, name = federation.folder(NAMES[0]), NAMES[0]
    photos = write_photos(folder / "later", first=5000)
    for photo in photos:
        (folder / "later" / photo.path).rename(folder / "photos" / photo.path)
    (folder / "later.csv").write_bytes(write_manifest(photos))
    policy = replace(POLICY, epsilon_limit=60.0, minimum_items=8)
    job = federation.job(nonce="next", declared=DECLARED + later)
    standing = replace(standings(federation, policy)[name], cohorts={"2026": DECLARED, "2027": later})
    (foretold, *_) = forecast(job, standings={name: standing}).sites
    with federation.site(
        policy=policy, cohorts={"2026": ("manifest.csv", DECLARED), "2027": ("later.csv", later)}
    ) as site:
        body = federation.opened(site.answer(federation.admission(job))).document.body
    assert len(foretold.exhausted) == 2, "both sides of 2026"
    assert foretold.refusals == ((body.reason,) if later < policy.minimum_items else ())
    assert isinstance(body, Refusal) == bool(foretold.refusals)


def test_two_rules_broken_are_both_told():
    job = plan_job(SPEC, declared_items=ITEMS, nonce="0")
    strict = Standing(policy=replace(POLICY, maximum_rounds=1, epsilon_limit=30.0))
    (first, *_) = forecast(job, standings={NAMES[0]: strict}).sites
    assert [line for line in first.refusals if "maximum_rounds" in line]
    assert [line for line in first.refusals if "ceiling is 30.00" in line]
    assert first.training[0].left == 0.0


def test_sites_that_stay_out_take_their_noise_along():
    job = plan_job(SPEC, declared_items=ITEMS, nonce="0")
    out = forecast(job, standings={NAMES[0]: Standing(policy=replace(POLICY, minimum_items=9))})
    everyone = forecast(job, standings={})
    assert out.willing == NAMES[1:]
    assert out.runs
    assert out.sites[1].observers.model_holder > everyone.sites[1].observers.model_holder
    assert out.sites[1].observers.coordinator == everyone.sites[1].observers.coordinator
    needed = replace(SPEC, aggregation=replace(SPEC.aggregation, minimum_sites=3))
    stuck = forecast(
        plan_job(needed, declared_items=ITEMS, nonce="0"),
        standings={NAMES[0]: Standing(policy=replace(POLICY, minimum_items=9))},
    )
    assert not stuck.runs


def test_shares_of_noise_cost_less_in_the_eyes_of_whoever_sees_the_total_alone():
    job = plan_job(SHARED, declared_items=ITEMS, nonce="0")
    forecasted = forecast(job, standings={})
    assert forecasted.willing
    observers = forecasted.sites[0].observers
    assert observers.coordinator == observers.model_holder < observers.other_partner < observers.full_collusion


@pytest.mark.no_cover
def test_an_account_of_integer_noise_alone_has_no_epsilon_for_a_poisson_job():
    job = plan_job(replace(SPEC, privacy=SGD), declared_items=ITEMS, nonce="0")
    (first, *_) = forecast(job, standings={NAMES[0]: Standing(policy=POLICY)}).sites
    assert math.isinf(first.training[0].after)
    assert any("policy.modes" in line for line in first.refusals)


@settings(max_examples=25)
@given(st.integers(0, 3), st.integers(1, 40), st.floats(0.1, 8.0), st.floats(0.1, 8.0))
def test_a_job_adds_at_least_nothing_and_at_most_its_own_cost(earlier, rounds, target, evaluation):
    spec = replace(
        SPEC, privacy=replace(SPEC.privacy, rounds=rounds, target_epsilon=target, evaluation_epsilon=evaluation)
    )
    job = plan_job(spec, declared_items=ITEMS, nonce="0")
    (site, *_) = forecast(job, standings={}).sites
    spending = site.training[0].spending
    for number in range(earlier):
        spending = job.plan.charge_training(spending, job=str(number))
    before = spending.epsilon(delta=job.plan.delta, composition="zcdp")
    after = job.plan.charge_training(spending, job="next").epsilon(delta=job.plan.delta, composition="zcdp")
    assert max(before, site.training[0].alone) <= after <= before + site.training[0].alone + 1e-9
    assert site.training[0].alone <= target
    assert site.held_out[0].alone <= evaluation


@pytest.mark.parametrize(
    "spec", [replace(SPEC, privacy=replace(SPEC.privacy, rounds=200)), SPEC, replace(SPEC, privacy=SGD), SHARED]
)
def test_a_path_leads_from_before_to_after_and_never_down(spec):
    job = plan_job(spec, declared_items=ITEMS, nonce="0")
    (account,) = forecast(job, standings={}).sites[0].training
    places, epsilons = zip(*training_path(account, job), strict=True)
    assert (places[0], places[-1]) == (0, spec.privacy.rounds + 1)
    assert (epsilons[0], epsilons[-1]) == (account.before, account.after)
    assert list(epsilons) == sorted(epsilons)
    assert list(places) == sorted(set(places))


@pytest.mark.parametrize("privacy", [SPEC.privacy, SGD, replace(SPEC.privacy, target_epsilon=2.0)])
def test_attacks_are_bounded_at_least_as_well_as_epsilon_and_delta_bound_them(privacy):
    job = plan_job(replace(SPEC, privacy=privacy), declared_items=ITEMS, nonce="0")
    forecasted = forecast(job, standings={})
    for name, (epsilon, delta, attack) in strongest_attacks(forecasted).items():
        assert epsilon == max(getattr(site.observers, name) for site in forecasted.sites)
        assert 0.01 <= attack.true_positive_rate <= strongest_attack(epsilon, delta=delta)
        assert 0.5 <= attack.area_under_curve <= 1.0


def forecast_metrics(table, *, sites=3, seed=0, evaluation=EVALUATION):
    plan = replace(calibrate(SPEC.privacy, participants=3), evaluate=evaluation)
    return metrics_forecast(table, plan, sites=sites, scale=SCALE, rng=np.random.default_rng(seed))


def test_the_deviation_of_accuracy_is_the_closed_form_where_nothing_is_clamped():
    evaluation = DiscreteGaussian(sensitivity=1024, scale=4096)
    table = plausible_counts(SCALE, items=6000.0)
    found = forecast_metrics(table, sites=5, evaluation=evaluation)
    accuracy, cells, grades = found.exact.accuracy, SCALE.grades**2, SCALE.grades
    variance = grades * (1 - accuracy) ** 2 + (cells - grades) * accuracy**2
    assert found.cell_deviation == pytest.approx(4 * math.sqrt(5))
    assert found.deviation.accuracy == pytest.approx(found.cell_deviation * math.sqrt(variance) / 6000, rel=0.1)
    assert found.mean.accuracy == pytest.approx(accuracy, abs=0.002)


def test_the_deviation_is_that_of_the_exact_sampler_summed_over_sites():
    evaluation, sites, draws = DiscreteGaussian(sensitivity=1024, scale=1500), 3, 300
    table = plausible_counts(SCALE, items=60.0)
    kappas = []
    for _ in range(draws):
        noise = sum(discrete_gaussian(SCALE.grades**2, scale=evaluation.scale) for _ in range(sites))
        counts = from_grid(noise, max_norm=1.0, mechanism=evaluation).reshape(SCALE.grades, SCALE.grades)
        kappas.append(metrics(ConfusionCounts.of(table.table + counts), SCALE).quadratic_weighted_kappa)
    found = forecast_metrics(table, sites=sites, evaluation=evaluation)
    # Six standard errors of the difference; the noise cannot be seeded.
    spread = found.deviation.quadratic_weighted_kappa
    assert np.mean(kappas) == pytest.approx(found.mean.quadratic_weighted_kappa, abs=6 * spread * (1 / draws) ** 0.5)
    assert np.std(kappas) == pytest.approx(spread, rel=6 * (1 / (2 * draws)) ** 0.5)


def test_more_sites_add_more_noise_and_the_same_seed_tells_the_same():
    table = plausible_counts(SCALE, items=200.0)
    few, many = forecast_metrics(table, sites=2), forecast_metrics(table, sites=50)
    assert few.deviation.quadratic_weighted_kappa < many.deviation.quadratic_weighted_kappa
    assert few == forecast_metrics(table, sites=2)
    assert few != forecast_metrics(table, sites=2, seed=1)


@given(st.integers(2, 8), st.floats(1.0, 1e6))
def test_a_made_up_table_has_as_many_of_each_grade_and_is_right_more_often_than_not(grades, items):
    labels = tuple(f"G{index}" for index in range(grades))
    cost = tuple(tuple(float(abs(true - decided)) for decided in range(grades)) for true in range(grades))
    scale = GradeScale(name="any", labels=labels, critical=labels[-1:], cost=cost)
    table = plausible_counts(scale, items=items).table
    assert table.sum(axis=1) == pytest.approx(np.full(grades, items / grades))
    assert (np.diag(table) > 0.5 * items / grades).all()
    assert 0 < metrics(ConfusionCounts.of(table), scale).quadratic_weighted_kappa < 1


@pytest.mark.usefixtures("quick")
def test_counts_that_were_published_are_taken_clamped_and_only_on_the_same_scale(federation):
    released = [federation.run_in_process(federation.job(with_privacy(rounds=1), nonce=nonce)) for nonce in "ab"]
    proof = verify_federation(federation.root)
    name, counts = latest_counts(proof, scale=SCALE)
    assert name == SPEC.name
    assert (counts.table == np.maximum(released[1].release.counts.table, 0.0)).all()
    assert latest_counts(proof, scale=replace(SCALE, name="other")) is None


def test_held_out_items_follow_from_what_is_declared():
    job = plan_job(SPEC, declared_items=ITEMS, nonce="0")
    assert held_out_items(job) == pytest.approx(3 * DECLARED)  # test_fraction is a half


def test_a_forecast_writes_nothing_and_needs_no_lock(federation):
    with federation.site():  # its ledger is held meanwhile
        before = {path: path.read_bytes() for path in federation.root.rglob("*") if path.is_file()}
        forecast(federation.job(), standings=standings(federation))
    assert {path: path.read_bytes() for path in before} == before


def test_what_a_policy_reserves_is_told_and_is_no_refusal():
    job = plan_job(SPEC, declared_items=ITEMS, nonce="0")
    reserved = replace(POLICY, approval=True, hours="20:00-06:00", releases=("centre", "train"))
    (first, *others) = forecast(job, standings={NAMES[0]: Standing(policy=reserved)}).sites
    assert first.refusals == ()
    assert [words.split()[0] for words in first.reservations] == ["a", "answers", "trains,"]
    assert all(site.reservations == () for site in others)


def test_a_coordinator_that_the_policy_does_not_name_is_foreseen(federation):
    job = plan_job(SPEC, declared_items=ITEMS, nonce="0")
    key = federation.roster.coordinator
    policy = replace(POLICY, coordinators=("0" * 64,))
    (first, *_) = forecast(job, standings={NAMES[0]: Standing(policy=policy, coordinator=key)}).sites
    assert any("policy.coordinators" in line for line in first.refusals)
