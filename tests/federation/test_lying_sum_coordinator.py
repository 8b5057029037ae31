"""A coordinator that lies about secure sums to real sites: one clear refusal each, nothing charged, nothing plain."""

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedgrade.aggregation.secure_sum.documents import (
    ShareKey,
    SumCommitment,
)
from fedgrade.aggregation.secure_sum.masks import public_bytes
from fedgrade.federation.messages import (
    CommitRequest,
    ContributeRequest,
)
from fedgrade.federation.payloads import Head, write_head
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import SigningKey
from tests.federation.lying_coordinator import ALL_OR_NOTHING, RECOVERING, Coordinator
from tests.federation.small_federation import SmallFederation, with_privacy, zero_head
from tests.federation.sum_partners import FIVE, SUMS, Partners, paid

pytestmark = pytest.mark.usefixtures("quick")
ALICE, BOB, CAROL, DAVE, ERIN = FIVE
THREE = FIVE[:3]


# --- vectors asked for in other ways than by the protocol ----------------------------------------------------------


@pytest.mark.parametrize("purpose", ["centre", "train", "evaluate"])
def test_no_release_leaves_without_everybody_s_commitments(coordinator, purpose):
    bare = ContributeRequest(purpose=purpose, round_index=0, attempt=0)
    coordinator.refused(ALICE, bare, "stale", "releases leave under masks alone", tensors=coordinator.head)
    proposal = coordinator.proposal(purpose=purpose)
    commitments = coordinator.committed(proposal)
    coordinator.refused(ALICE, bare, "stale", "releases leave under masks alone", tensors=coordinator.head)
    coordinator.total(proposal, commitments)


def test_commitments_count_for_their_own_attempt_purpose_and_round_alone(coordinator):
    first = coordinator.proposal()
    earlier = coordinator.committed(first)
    second = coordinator.proposal(attempt=1)
    commitments = coordinator.committed(second)
    for body, code, reason in (
        (coordinator.contribution(first, earlier), "attempt", "is not committed to it"),
        (coordinator.contribution(second, earlier), "stale", "to other terms than this site signed"),
        (coordinator.contribution(second, commitments, purpose="train"), "attempt", "is not committed to it"),
        (coordinator.contribution(second, commitments, purpose="evaluate"), "attempt", "is not committed to it"),
        (coordinator.contribution(second, commitments, attempt=2), "attempt", "is not committed to it"),
        (coordinator.contribution(second, commitments, round_index=1), "stale", "the plan has no such round"),
    ):
        coordinator.refused(ALICE, body, code, reason, tensors=coordinator.head)
    coordinator.total(second, commitments)


def test_weights_are_those_that_everybody_was_promised(coordinator):
    proposal = coordinator.proposal()
    commitments = coordinator.committed(proposal)
    shape = coordinator.job.head_shape()
    trap = write_head(Head(thresholds=np.ones(shape), centre=np.zeros(shape[1] - 1)))
    coordinator.refused(
        ALICE, coordinator.contribution(proposal, commitments), "stale", "not those that every site", tensors=trap
    )
    coordinator.total(proposal, commitments)


@pytest.mark.parametrize("left_out", [ALICE, BOB])
def test_every_commitment_of_the_set_is_asked_for(coordinator, left_out):
    proposal = coordinator.proposal()
    honest = coordinator.committed(proposal)
    short = replace(honest, envelopes={site: raw for site, raw in honest.envelopes.items() if site != left_out})
    body = coordinator.contribution(proposal, short)
    coordinator.refused(ALICE, body, "stale", "of 4 sites for 5 participants", tensors=coordinator.head)


def test_a_job_that_adds_nothing_up_takes_no_commitments_and_makes_none(partners, coordinator):
    summed = coordinator.proposal()
    commitments = coordinator.committed(summed)
    partners.policy = replace(SUMS, modes=("local",))
    for site in FIVE:
        partners.restart(site)
    plain = Coordinator(partners, with_privacy(rounds=1))
    body = plain.contribution(summed, commitments)
    plain.refused(ALICE, body, "stale", "adds nothing up under masks", tensors=zero_head(plain.job))
    proposal = replace(summed, terms=replace(summed.terms, task=replace(summed.terms.task, job=plain.job.digest)))
    plain.refused(ALICE, CommitRequest(proposal=proposal), "stale", "adds nothing up under masks")


# --- sets that must not be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("plan_digest", "00" * 32), ("size", 2), ("entry_limit", 5), ("job", "00" * 32)],
)
def test_terms_are_worked_out_from_the_site_s_own_copy_of_the_job(coordinator, field, value):
    proposal = coordinator.proposal(**{field: value})
    coordinator.refused(ALICE, CommitRequest(proposal=proposal), "stale", f"the proposed {field} is not the one")


def test_a_set_with_less_noise_than_the_plan_counts_on_is_refused(coordinator):
    proposal = CommitRequest(proposal=coordinator.proposal(FIVE[:2]))
    coordinator.refused(ALICE, proposal, "policy", "2 sites are sure to add noise; the plan counts on 3")


@pytest.mark.parametrize(("spec", "participants", "sure"), [(ALL_OR_NOTHING, THREE, 3), (RECOVERING, FIVE[:4], 3)])
def test_a_set_of_which_too_few_are_sure_to_be_in_the_total_is_refused(partners, spec, participants, sure):
    """The partner asks for four in every total: a site that may vanish from it does not count."""
    partners.policy = replace(SUMS, minimum_participants=4)
    for site in FIVE:
        partners.restart(site)
    coordinator = Coordinator(partners, spec)
    proposal = CommitRequest(proposal=coordinator.proposal(participants))
    coordinator.refused(
        ALICE, proposal, "policy", f"{sure} participants are sure to be in the total; this site's policy"
    )


def test_a_policy_that_is_tightened_between_the_phases_counts_for_the_vector(tmp_path):
    policies = [SUMS]
    federation = SmallFederation.create(tmp_path / "five", names=FIVE)
    with Partners.of(federation, lambda: policies[-1]) as partners:
        coordinator = Coordinator(partners)
        proposal = coordinator.proposal(THREE)
        commitments = coordinator.committed(proposal)
        policies.append(replace(SUMS, minimum_participants=4))
        body = coordinator.contribution(proposal, commitments)
        coordinator.refused(ALICE, body, "attempt", "not committed to it", tensors=coordinator.head)
        further = CommitRequest(proposal=coordinator.proposal(THREE, attempt=1))
        coordinator.refused(ALICE, further, "policy", "this site's policy asks for 4")


def test_who_does_not_take_part_in_the_job_is_in_no_set(partners):
    coordinator = Coordinator(partners, participants=FIVE[:4])
    proposal = CommitRequest(proposal=coordinator.proposal((*THREE, ERIN)))
    coordinator.refused(ALICE, proposal, "stale", "recycler-e does not take part in job small")
    honest = CommitRequest(proposal=coordinator.proposal(FIVE[1:4]))
    coordinator.refused(ALICE, honest, "stale", "recycler-a is not among the participants")


def test_one_attempt_is_of_one_set(coordinator):
    first, other = coordinator.proposal(), coordinator.proposal(THREE)
    commitments = coordinator.committed(first)
    coordinator.refused(ALICE, CommitRequest(proposal=other), "attempt", "was begun before")
    assert coordinator.ask(ALICE, CommitRequest(proposal=first)).commitment == commitments.envelopes[ALICE]
    mixed = replace(commitments, envelopes={site: commitments.envelopes[site] for site in THREE})
    body = coordinator.contribution(other, mixed)
    coordinator.refused(ALICE, body, "stale", "of 3 sites for 5 participants", tensors=coordinator.head)
    coordinator.total(first, commitments)


def test_a_charged_attempt_is_asked_of_no_other_set_and_a_further_one_is_charged(coordinator):
    first = coordinator.proposal()
    coordinator.total(first, coordinator.committed(first)).total()
    coordinator.refused(ALICE, CommitRequest(proposal=coordinator.proposal(THREE)), "spent", "was already charged")
    further = coordinator.proposal(THREE, attempt=1)
    coordinator.total(further, coordinator.committed(further)).total()
    assert [paid(coordinator.federation, site)["centre", 0] for site in FIVE] == [2, 2, 2, 1, 1]


# --- keys and signatures --------------------------------------------------------------------------------------------


def test_a_swapped_key_is_not_signed_by_the_site_on_one_s_own_roster(coordinator):
    proposal = coordinator.proposal()
    honest = coordinator.committed(proposal)
    key = coordinator.federation.roster.key_of(BOB)
    swapped = replace(
        open_sealed(honest.envelopes[BOB].encode(), as_=SumCommitment, signed_by=key),
        public_key=public_bytes(X25519PrivateKey.generate()).hex(),
    )
    for forger in (coordinator.federation.coordinator_key, SigningKey.generate()):
        envelopes = {**honest.envelopes, BOB: seal(swapped, forger).decode()}
        body = coordinator.contribution(proposal, replace(honest, envelopes=envelopes))
        coordinator.refused(ALICE, body, "malformed", "SumCommitment: signed by key", tensors=coordinator.head)
    crossed = {**honest.envelopes, BOB: honest.envelopes[CAROL]}
    body = coordinator.contribution(proposal, replace(honest, envelopes=crossed))
    coordinator.refused(ALICE, body, "malformed", "signed by key", tensors=coordinator.head)
    coordinator.total(proposal, honest)


def test_a_swapped_share_key_is_not_signed_by_its_site(recovering):
    proposal = recovering.proposal()
    own = public_bytes(X25519PrivateKey.generate()).hex()
    forged = ShareKey(job=recovering.job.digest, site=BOB, public_key=own)
    terms = replace(proposal.terms, share_keys={**proposal.terms.share_keys, BOB: own})
    for envelope, code, reason in (
        (seal(forged, recovering.federation.coordinator_key).decode(), "malformed", "ShareKey: signed by key"),
        (proposal.share_key_envelopes[BOB], "stale", "share key of recycler-b: is not the one in the terms"),
    ):
        envelopes = {**proposal.share_key_envelopes, BOB: envelope}
        body = CommitRequest(proposal=replace(proposal, terms=terms, share_key_envelopes=envelopes))
        recovering.refused(ALICE, body, code, reason)


# --- replays --------------------------------------------------------------------------------------------------------


def test_after_a_restart_a_replayed_round_gets_the_old_bytes_or_nothing(coordinator):
    proposal = coordinator.proposal()
    commitments = coordinator.committed(proposal)
    coordinator.total(proposal, commitments)
    body = coordinator.contribution(proposal, commitments)
    message = coordinator.message(ALICE, body, coordinator.head)
    before = coordinator.federation.ledger(ALICE).read_bytes()
    sent = coordinator.partners.answer(ALICE, message)
    coordinator.partners.restart(ALICE)
    assert coordinator.partners.answer(ALICE, message) == sent
    assert coordinator.federation.ledger(ALICE).read_bytes() == before
    # The same round in other bytes is another question, and that round was charged.
    other = replace(commitments, envelopes=dict.fromkeys(commitments.envelopes, commitments.envelopes[BOB]))
    coordinator.refused(
        ALICE, coordinator.contribution(proposal, other), "spent", "already charged", tensors=coordinator.head
    )
    coordinator.refused(ALICE, CommitRequest(proposal=proposal), "spent", "already charged")


def test_a_restart_between_the_phases_forgets_the_attempt_and_costs_nothing(coordinator):
    proposal = coordinator.proposal()
    commitments = coordinator.committed(proposal)
    coordinator.partners.restart(ALICE)
    body = coordinator.contribution(proposal, commitments)
    coordinator.refused(ALICE, body, "attempt", "not committed to it", tensors=coordinator.head)


def test_attempts_are_charged_as_often_as_the_policy_allows(coordinator):
    for attempt in range(SUMS.maximum_attempts):
        proposal = coordinator.proposal(attempt=10 * attempt)
        coordinator.total(proposal, coordinator.committed(proposal))
    further = CommitRequest(proposal=coordinator.proposal(attempt=999))
    coordinator.refused(ALICE, further, "stale", "was charged 3 times; policy.maximum_attempts is 3")
    assert paid(coordinator.federation, ALICE) == {("centre", 0): SUMS.maximum_attempts}


def test_a_stage_that_the_job_has_left_behind_is_not_summed_again(coordinator):
    later = coordinator.proposal(purpose="train")
    coordinator.total(later, coordinator.committed(later))
    coordinator.refused(ALICE, CommitRequest(proposal=coordinator.proposal()), "stale", "this job has moved on")
