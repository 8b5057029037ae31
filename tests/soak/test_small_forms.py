"""The slow tests' machinery in seconds, so that it cannot rot between two soaks."""

from dataclasses import replace

import numpy as np

from fedgrade.federation.canaries import CanaryTrial, audit_job
from fedgrade.privacy.audit import deviation_check, shift_check
from tests.soak.aggregate_canaries import aggregate_claim, aggregate_scores
from tests.soak.shadows import Items, Shadow, confidence, job_at, trained

ITEMS = 60


def shadow(spec, *, epsilon):
    short = replace(spec, privacy=replace(spec.privacy, rounds=3), data=replace(spec.data, minimum_items=2))
    rng = np.random.default_rng(0)
    features = np.abs(rng.normal(size=(ITEMS, spec.model.feature_dimensions))).astype(np.float32)
    items = Items(features=features, grades=np.arange(ITEMS) % spec.grading.grades)
    return Shadow(spec=short, epsilon=epsilon, items=items, members=np.arange(ITEMS) < ITEMS // 2)


def test_without_noise_a_shadow_model_is_the_same_every_time_and_surer_of_what_it_was_shown(demo_spec):
    silent = shadow(demo_spec, epsilon=None)
    first, second = confidence(silent), confidence(silent)
    np.testing.assert_array_equal(first, second)
    assert first[silent.members].mean() > first[~silent.members].mean() + 0.2


def test_with_an_epsilon_the_noise_is_the_site_s_own_and_different_every_time(demo_spec):
    noisy = shadow(demo_spec, epsilon=8.0)
    first, second = trained(noisy), trained(noisy)
    assert np.abs(first.thresholds - second.thresholds).mean() > 0
    job = job_at(noisy.spec, 8.0, declared=ITEMS // 2)
    spread = np.std(first.centre - second.centre) / np.sqrt(2) * (ITEMS // 2)
    assert 0.9 < spread / (job.plan.centre.scale / job.plan.centre.sensitivity) < 1.1


def test_the_sum_over_sites_has_the_noise_of_all_of_them():
    trial = CanaryTrial(job=audit_job(epsilon=16.0, rounds=2), purpose="train", canaries=400)
    scores, claim = aggregate_scores(trial), aggregate_claim(trial)
    assert claim.epsilon < trial.claim.epsilon
    for check in (shift_check(scores, claim), deviation_check(scores)):
        assert check.passed, check
    # Under the claim of one site alone, its shift would be missed by far.
    assert not shift_check(scores, trial.claim).passed
