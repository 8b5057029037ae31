"""Whole jobs under a secure sum, every byte through ``Site.answer``: what they cost, who is in them, what faults do."""

from collections import Counter
from dataclasses import replace

import pytest

from fedgrade.federation.messages import (
    AdmitRequest,
    CommitRequest,
    ContributeRequest,
    Contribution,
    RevealRequest,
    VoteRequest,
)
from fedgrade.federation.payloads import read_masked
from fedgrade.federation.verification import verify_federation
from tests.federation.small_federation import NAMES, SmallFederation
from tests.federation.sum_partners import FIVE, SUMS, Noted, Partners, Wire, at, paid, place, summing

pytestmark = pytest.mark.usefixtures("quick")
GONE = NAMES[2]
DEADLINE_SECONDS = 1.0  # of a stage, in a small federation
ONE_ROUND = summing(minimum_sites=2)
EACH_ONCE = {("centre", 0): 1, ("train", 0): 1, ("evaluate", 0): 1}


@pytest.fixture
def partners(federation):
    with Partners.of(federation) as partners:
        yield partners


@pytest.fixture
def five(tmp_path):
    with Partners.of(SmallFederation.create(tmp_path / "five", names=FIVE)) as partners:
        yield partners


def run(partners, spec, meddle=None):
    """The job, its wire, and what was noted on the way; every total is the plain sum, and the folder verifies."""
    federation = partners.federation
    job, wire = federation.job(spec), Wire(partners, meddle) if meddle else Wire(partners)
    with pytest.MonkeyPatch.context() as patch:
        noted = Noted(patch, wire)
        federation.run(job, wire)
    noted.require_exact()
    proof = verify_federation(federation.root, roster=federation.roster)
    assert len(proof.jobs[job.digest].rounds) == spec.privacy.rounds + 2
    return job, wire, noted


def test_every_total_is_the_plain_sum_and_every_upload_differs_from_it_everywhere(partners):
    job, wire, noted = run(partners, summing(rounds=2))
    assert len(noted.plain) == 3 * (2 + 2)
    uploads = wire.replies(Contribution)
    assert len(uploads) == len(noted.plain)
    for site, body, reply in uploads:
        masked = read_masked(reply.tensors, job, body.purpose)
        plain = noted.plain[body.purpose, body.round_index, body.attempt, site]
        assert (masked != plain).all()
        assert plain.tobytes() not in reply.tensors
    assert partners.federation.release(job).release.contributions == dict.fromkeys(NAMES, 2 + 2)
    assert {site: len(partners.federation.charges(site)) for site in NAMES} == dict.fromkeys(NAMES, 2 + 2)


def test_a_round_takes_two_phases_and_the_job_one_admission_before_them(partners):
    _, wire, _ = run(partners, ONE_ROUND)
    kinds = [{type(body) for body in call.values()} for call in wire.calls]
    assert kinds == [{AdmitRequest}, *3 * [{CommitRequest}, {ContributeRequest}]]


def test_a_site_that_vanishes_before_it_commits_costs_nobody_anything_rests_and_comes_back(partners):
    def gone_in_the_first_round(site, body, pass_on):
        silent = site == GONE and at(body, CommitRequest, "train") and body.proposal.terms.task.round_index == 0
        return None if silent else pass_on()

    job, wire, noted = run(partners, summing(rounds=3), gone_in_the_first_round)
    federation = partners.federation
    assert set(paid(federation, NAMES[0]).values()) == {1}
    # The second round does not wait for it; the third asks, and it is back.
    assert [where[1] for where in wire.asked(CommitRequest, GONE) if where[0] == "train"] == [0, 0, 0, 2]
    assert sorted(paid(federation, GONE)) == [("centre", 0), ("evaluate", 0), ("train", 2)]
    assert federation.release(job).release.contributions == {NAMES[0]: 5, NAMES[1]: 5, GONE: 3}
    assert [where[2] for where, _ in noted.gathered] == [0, 1, 0, 0, 0]


def test_a_site_that_vanishes_after_it_committed_costs_the_others_one_more_charge(partners):
    def gone(site, body, pass_on):
        return None if site == GONE and at(body, ContributeRequest, "train", attempt=0) else pass_on()

    job, _, noted = run(partners, ONE_ROUND, gone)
    federation = partners.federation
    assert paid(federation, NAMES[0]) == paid(federation, NAMES[1]) == {**EACH_ONCE, ("train", 0): 2}
    # It never charged, and rests longer than one stage after what it cost others.
    assert paid(federation, GONE) == {("centre", 0): 1}
    assert [where for where, _ in noted.gathered] == [("centre", 0, 0), ("train", 0, 1), ("evaluate", 0, 0)]
    assert federation.release(job).release.contributions == {NAMES[0]: 3, NAMES[1]: 3, GONE: 1}


def test_a_reply_that_is_lost_once_is_sent_again_byte_for_byte_and_charged_once(partners):
    lost = []

    def lossy(site, body, pass_on):
        reply = pass_on()
        if site == GONE and at(body, ContributeRequest, "train"):
            lost.append(reply)
            return None if len(lost) == 1 else reply
        return reply

    _, wire, noted = run(partners, ONE_ROUND, lossy)
    assert len(lost) == 2
    assert lost[0] == lost[1]
    assert {site: paid(partners.federation, site) for site in NAMES} == dict.fromkeys(NAMES, EACH_ONCE)
    assert all(gathered.sites == NAMES for _, gathered in noted.gathered)
    assert len(wire.asked(ContributeRequest, NAMES[0])) == 3


def test_a_reply_that_is_lost_for_good_stays_charged_and_uncounted(partners):
    def lossy(site, body, pass_on):
        reply = pass_on()
        return None if site == GONE and at(body, ContributeRequest, "train") else reply

    _, _, noted = run(partners, ONE_ROUND, lossy)
    assert paid(partners.federation, GONE)["train", 0] == 1
    assert noted.gathered[1][1].sites == NAMES[:2]


def test_a_site_whose_policy_wants_more_company_waits_for_it_and_comes_back(five):
    """A partner vanishes for one stage, and another does not take part in so small a set; it is not out for that."""
    gone, strict = FIVE[3:]
    five.policies[strict] = replace(SUMS, minimum_participants=5)
    five.restart(strict)

    def gone_at_first(site, body, pass_on):
        return None if site == gone and at(body, CommitRequest, "centre") else pass_on()

    _, wire, noted = run(five, summing(rounds=2, minimum_sites=3), gone_at_first)
    assert not noted.put_out
    assert wire.refusals() == [(strict, "policy")]
    assert [gathered.sites for _, gathered in noted.gathered] == [FIVE[:3], FIVE[:3], FIVE, FIVE]
    assert set(paid(five.federation, FIVE[0]).values()) == {1}


def test_a_site_that_is_gone_for_good_is_asked_ever_more_seldom_and_each_attempt_keeps_the_deadline(partners):
    def gone(site, body, pass_on):
        return None if site == GONE and not isinstance(body, AdmitRequest) else pass_on()

    job, wire, _ = run(partners, summing(rounds=8), gone)
    federation = partners.federation
    assert paid(federation, GONE) == {}
    assert set(paid(federation, NAMES[0]).values()) == {1}
    stages = dict.fromkeys(where[:2] for where in wire.asked(CommitRequest, GONE))
    assert list(stages) == [("centre", 0), ("train", 1), ("train", 4)]
    # The waits of one attempt together, in all its phases, asked again included.
    waits = Counter()
    for call, wait in zip(wire.calls, wire.waits, strict=True):
        body = next(iter(call.values()))
        if not isinstance(body, AdmitRequest):
            waits[place(body)] += wait
    assert len(waits) == 10 + len(stages)
    assert max(waits.values()) <= DEADLINE_SECONDS
    assert federation.release(job).release.contributions == {NAMES[0]: 10, NAMES[1]: 10}


def test_a_site_that_restarts_between_the_phases_is_in_the_next_attempt(partners):
    restarted = []

    def restart(site, body, pass_on):
        if site == GONE and at(body, ContributeRequest, "train") and not restarted:
            restarted.append(site)
            partners.restart(site)
        return pass_on()

    _, wire, noted = run(partners, ONE_ROUND, restart)
    assert wire.refusals() == [(GONE, "attempt")]
    assert noted.gathered[1][0] == ("train", 0, 1)
    assert all(gathered.sites == NAMES for _, gathered in noted.gathered)
    federation = partners.federation
    assert paid(federation, GONE) == EACH_ONCE
    assert paid(federation, NAMES[0]) == {**EACH_ONCE, ("train", 0): 2}


def test_a_site_that_restarts_after_it_answered_resends_from_its_outbox(partners):
    replies = []

    def restart(site, body, pass_on):
        reply = pass_on()
        if site == GONE and at(body, ContributeRequest, "train"):
            replies.append(reply)
            if len(replies) == 1:
                partners.restart(site)
                return None
        return reply

    _, wire, noted = run(partners, ONE_ROUND, restart)
    assert replies[0] == replies[1]
    assert not wire.refusals()
    assert noted.gathered[1][0] == ("train", 0, 0)


# --- recovery: the total stands although a site vanished ------------------------------------------------------------

RECOVERING = summing(minimum_sites=3, tolerate_dropouts=1)


@pytest.mark.parametrize("charged", [False, True])
def test_with_recovery_the_total_stands_without_the_site_that_vanished(five, charged):
    gone = FIVE[1]

    def lossy(site, body, pass_on):
        if site == gone and at(body, ContributeRequest, "train"):
            if charged:
                pass_on()
            return None
        return pass_on()

    job, wire, noted = run(five, RECOVERING, lossy)
    where, gathered = noted.gathered[1]
    assert where == ("train", 0, 0)
    assert gathered.sites == tuple(site for site in FIVE if site != gone)
    federation = five.federation
    assert all(paid(federation, site) == EACH_ONCE for site in FIVE if site != gone)
    # It may charge for a vector that nobody counted: that stands, and the verifier has it.
    assert paid(federation, gone).get(("train", 0), 0) == charged
    asked_to_vote = [set(call) for call in wire.calls if isinstance(next(iter(call.values())), VoteRequest)]
    assert asked_to_vote == [set(FIVE), set(gathered.sites), set(gathered.sites)]
    assert federation.release(job).release.contributions[gone] == 1


def test_with_recovery_a_restarted_site_announces_a_new_share_key(five):
    late, restarted = FIVE[3], []

    def restart(site, body, pass_on):
        if site == late and at(body, CommitRequest, "train") and not restarted:
            restarted.append(site)
            five.restart(site)
        return pass_on()

    _, wire, noted = run(five, RECOVERING, restart)
    assert wire.refusals() == [(late, "attempt")]
    keys = {
        body.proposal.terms.share_keys[late]
        for call in wire.calls
        for body in call.values()
        if isinstance(body, CommitRequest) and late in body.proposal.terms.share_keys
    }
    assert len(keys) == 2
    admissions = [call for call in wire.calls if isinstance(next(iter(call.values())), AdmitRequest)]
    assert [set(call) for call in admissions] == [set(FIVE), {late}]
    assert all(gathered.sites == FIVE for _, gathered in noted.gathered)
    assert all(paid(five.federation, site) == EACH_ONCE for site in FIVE)


def test_with_recovery_a_round_takes_four_phases(five):
    _, wire, _ = run(five, RECOVERING)
    kinds = [{type(body) for body in call.values()} for call in wire.calls]
    assert kinds == [{AdmitRequest}, *3 * [{CommitRequest}, {ContributeRequest}, {VoteRequest}, {RevealRequest}]]


def test_with_recovery_a_survivor_that_never_votes_is_left_out_of_the_next_attempt(five):
    mute = FIVE[4]

    def no_vote(site, body, pass_on):
        return None if site == mute and isinstance(body, VoteRequest) else pass_on()

    _, _, noted = run(five, RECOVERING, no_vote)
    assert [where for where, _ in noted.gathered] == [("centre", 0, 1), ("train", 0, 0), ("evaluate", 0, 0)]
    assert all(mute not in gathered.sites for _, gathered in noted.gathered)
    assert paid(five.federation, FIVE[0]) == {**EACH_ONCE, ("centre", 0): 2}
