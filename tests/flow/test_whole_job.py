from dataclasses import replace

import pytest

from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.verification import verify_federation
from fedgrade.privacy.plan import DistributedSpec, LocalSgdSpec, LocalSpec, observer_epsilons
from tests.federation.small_federation import DISTRIBUTED, LOCAL_SGD, NAMES, POLICY, PRIVACY, with_privacy

GENEROUS = replace(POLICY, epsilon_limit=1000.0, epsilon_per_job=600.0)


def test_a_job_opens_verifies_and_costs_what_its_plan_said(federation):
    job = federation.job()
    release = federation.run_in_process(job)
    proof = verify_federation(federation.root, roster=federation.roster)

    assert proof.jobs[job.digest].release.digest == release.digest
    assert release.release.contributions == dict.fromkeys(NAMES, job.plan.rounds + 2)
    planned = observer_epsilons(job.plan, participants=len(NAMES))
    assert proof.jobs[job.digest].observers == dict.fromkeys(NAMES, planned)
    assert planned.coordinator <= PRIVACY.target_epsilon
    for site in NAMES:
        assert len(proof.sites[site].charges) == job.plan.rounds + 2
        assert {charge.outcome for charge in proof.sites[site].charges.values()} == {"committed"}
        assert proof.sites[site].job_epsilon(job.digest, partition="test") <= PRIVACY.evaluation_epsilon


def test_with_privacy_to_spare_the_model_learns_what_can_be_learnt(federation):
    job = federation.job(with_privacy(target_epsilon=500.0, evaluation_epsilon=500.0, rounds=4))
    measured = federation.run_in_process(job, policy=GENEROUS).release.metrics
    assert measured.accuracy > 0.9
    assert measured.quadratic_weighted_kappa > 0.9
    assert measured.items == pytest.approx(24, abs=2)


def test_two_jobs_add_up_in_one_ledger(federation):
    first, second = federation.job(nonce="1"), federation.job(nonce="2")
    federation.run_in_process(first)
    federation.run_in_process(second)
    proof = verify_federation(federation.root)
    assert set(proof.jobs) == {first.digest, second.digest}
    alone = proof.sites[NAMES[0]].job_epsilon(first.digest, partition="train")
    (both,) = (account for key, account in proof.sites[NAMES[0]].accounts.items() if key.partition == "train")
    assert both.epsilon > alone


def test_a_site_without_held_out_items_answers_with_noise_alone(federation):
    manifest = federation.folder(NAMES[0]) / "manifest.csv"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if ",test," not in line))
    release = federation.run_in_process(federation.job())
    assert release.release.metrics.items == pytest.approx(16, abs=4)


def test_local_sgd_runs_to_a_release_that_verifies(federation):
    policy = replace(POLICY, modes=("local", "local_sgd"))
    job = federation.job(LOCAL_SGD)
    federation.run_in_process(job, policy=policy)
    seen = verify_federation(federation.root).jobs[job.digest].observers[NAMES[0]]
    assert seen.coordinator == seen.model_holder <= LOCAL_SGD.privacy.target_epsilon


def test_distributed_mode_runs_where_coordinator_and_sites_are_one_process(federation):
    policy = replace(POLICY, modes=("distributed",), epsilon_per_job=60.0)
    job = federation.job(DISTRIBUTED)
    federation.run_in_process(job, policy=policy)
    seen = verify_federation(federation.root).jobs[job.digest].observers[NAMES[0]]
    assert seen.model_holder <= seen.other_partner <= DISTRIBUTED.privacy.target_epsilon
    assert seen.full_collusion <= DISTRIBUTED.privacy.floor_epsilon


def test_distributed_mode_keeps_its_target_although_a_site_stays_silent(federation):
    policy = replace(POLICY, modes=("distributed",), epsilon_per_job=60.0)
    job = federation.job(DISTRIBUTED)
    with federation.answers(policy=policy) as answers:
        federation.run(job, InProcessCohort(sites={name: answers[name] for name in NAMES[:2]}))
    seen = verify_federation(federation.root).jobs[job.digest].observers[NAMES[0]]
    assert seen.coordinator <= seen.other_partner <= DISTRIBUTED.privacy.target_epsilon


def test_the_spec_of_every_mode_is_covered_here():
    assert {LocalSpec, DistributedSpec, LocalSgdSpec} == {
        type(PRIVACY),
        type(DISTRIBUTED.privacy),
        type(LOCAL_SGD.privacy),
    }
