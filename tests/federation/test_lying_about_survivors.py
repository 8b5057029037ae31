"""A coordinator that lies about who vanished, and what real sites keep of an attempt: shares once, and then nothing."""

import pytest

from fedgrade.aggregation.secure_sum.documents import (
    SumSurvivors,
    SumVotes,
    transcript_of,
)
from fedgrade.aggregation.secure_sum.states import Over
from fedgrade.federation.messages import (
    Refusal,
    Revealed,
    RevealRequest,
    Voted,
    VoteRequest,
)
from tests.federation.lying_coordinator import ALL_OR_NOTHING, RECOVERING, Coordinator
from tests.federation.sum_partners import FIVE, paid

pytestmark = pytest.mark.usefixtures("quick")
ALICE, BOB, CAROL, DAVE, ERIN = FIVE
THREE = FIVE[:3]


def votes_of(coordinator, survivors, transcript, among):
    """The votes of ``among`` for ``survivors``."""
    request = VoteRequest(survivors=SumSurvivors(transcript=transcript, survivors=survivors))
    said = {site: coordinator.ask(site, request) for site in among}
    return {site: body.vote for site, body in said.items() if isinstance(body, Voted)}


def masked(coordinator):
    """An attempt whose vectors have all arrived; its transcript."""
    proposal = coordinator.proposal()
    commitments = coordinator.committed(proposal)
    coordinator.total(proposal, commitments)
    raw = {site: envelope.encode() for site, envelope in commitments.envelopes.items()}
    return transcript_of(proposal.terms, raw)


def without(site):
    return tuple(other for other in FIVE if other != site)


def test_a_site_votes_for_one_set_of_survivors(recovering):
    transcript = masked(recovering)
    vote = VoteRequest(survivors=SumSurvivors(transcript=transcript, survivors=without(ERIN)))
    kept = recovering.ask(ALICE, vote)
    for survivors in (without(DAVE), FIVE):
        other = VoteRequest(survivors=SumSurvivors(transcript=transcript, survivors=survivors))
        recovering.refused(ALICE, other, "attempt", "out of order; this site's attempt is voted")
    assert recovering.ask(ALICE, vote) == kept
    alive = VoteRequest(survivors=SumSurvivors(transcript=transcript, survivors=without(BOB)))
    recovering.refused(BOB, alive, "stale", "without recycler-b, which is alive")
    few = VoteRequest(survivors=SumSurvivors(transcript=transcript, survivors=THREE))
    recovering.refused(BOB, few, "stale", "the terms need 4")


def test_a_site_that_is_called_alive_here_and_dead_there_keeps_both_its_secrets(recovering):
    transcript = masked(recovering)
    # Two are told that Erin vanished, the others that she is there.
    dead = votes_of(recovering, without(ERIN), transcript, (ALICE, BOB))
    alive = votes_of(recovering, FIVE, transcript, (CAROL, DAVE, ERIN))
    for site, envelopes in (
        (ALICE, {**dead, CAROL: alive[CAROL], DAVE: alive[DAVE]}),
        (CAROL, {**dead, **alive}),
    ):
        request = RevealRequest(votes=SumVotes(transcript=transcript, envelopes=envelopes))
        recovering.refused(site, request, "stale", "for another set of survivors")
    request = RevealRequest(votes=SumVotes(transcript=transcript, envelopes=dead))
    recovering.refused(ALICE, request, "stale", "not of exactly the survivors")


def test_shares_are_revealed_once_and_a_second_unmasking_gets_nothing(recovering):
    transcript = masked(recovering)
    survivors = without(ERIN)
    votes = SumVotes(transcript=transcript, envelopes=votes_of(recovering, survivors, transcript, survivors))
    revealed = recovering.ask(ALICE, RevealRequest(votes=votes))
    assert isinstance(revealed, Revealed)
    assert recovering.ask(ALICE, RevealRequest(votes=votes)) == revealed
    again = SumVotes(transcript=transcript, envelopes={site: votes.envelopes[site] for site in survivors[:-1]})
    recovering.refused(ALICE, RevealRequest(votes=again), "attempt", "this site's attempt is over")
    everybody = VoteRequest(survivors=SumSurvivors(transcript=transcript, survivors=FIVE))
    recovering.refused(ALICE, everybody, "attempt", "this site's attempt is over")
    assert paid(recovering.federation, ALICE) == {("centre", 0): 1}


def test_no_vote_is_asked_for_before_the_vector_has_left_or_after_a_restart(recovering):
    proposal = recovering.proposal()
    recovering.committed(proposal)
    early = VoteRequest(survivors=SumSurvivors(transcript="00" * 32, survivors=FIVE))
    recovering.refused(ALICE, early, "attempt", "this site's attempt is committed")
    further = recovering.proposal(attempt=1)
    commitments = recovering.committed(further)
    recovering.total(further, commitments)
    raw = {site: envelope.encode() for site, envelope in commitments.envelopes.items()}
    vote = VoteRequest(survivors=SumSurvivors(transcript=transcript_of(further.terms, raw), survivors=FIVE))
    recovering.partners.restart(ALICE)
    recovering.refused(ALICE, vote, "attempt", "this site's attempt is over")


# --- what a site keeps ----------------------------------------------------------------------------------------------


def secrets_of(site):
    """Every secret buffer that a site's place at secure sums holds."""
    attempt = site._sums._sums._attempt
    shares = getattr(attempt, "held", None) or getattr(attempt, "own", {})
    masks = [mask.seed for mask in getattr(attempt, "masks", ())]
    buffers = [
        *masks,
        getattr(attempt, "seed", b""),
        *(part for one in shares.values() for part in (one.key, one.seed)),
    ]
    return [buffer for buffer in buffers if buffer]


def test_after_a_round_no_secret_of_it_is_left_at_any_site(recovering):
    proposal = recovering.proposal()
    commitments = recovering.committed(proposal)
    sites = recovering.partners.sites
    buffers = {site: secrets_of(sites[site]) for site in FIVE}
    assert all(any(buffer) for held in buffers.values() for buffer in held)
    recovering.total(proposal, commitments)
    # Until everybody has voted, shares of the others; own shares among them.
    for site in FIVE:
        buffers[site] += secrets_of(sites[site])
    raw = {site: envelope.encode() for site, envelope in commitments.envelopes.items()}
    transcript = transcript_of(proposal.terms, raw)
    votes = SumVotes(transcript=transcript, envelopes=votes_of(recovering, FIVE, transcript, FIVE))
    for site in FIVE:
        assert isinstance(recovering.ask(site, RevealRequest(votes=votes)), Revealed)
        assert isinstance(sites[site]._sums._sums._attempt, Over)
        assert not any(any(buffer) for buffer in buffers[site])


@pytest.mark.parametrize("spec", [ALL_OR_NOTHING, RECOVERING])
def test_an_attempt_that_data_stop_leaves_no_secret(partners, spec, monkeypatch):
    coordinator = Coordinator(partners, spec)
    proposal = coordinator.proposal()
    commitments = coordinator.committed(proposal)
    site = partners.sites[ALICE]
    buffers = secrets_of(site)
    monkeypatch.setattr("fedgrade.federation.site.noisy_sum", out_of_memory)
    body = coordinator.ask(ALICE, coordinator.contribution(proposal, commitments), coordinator.head)
    assert isinstance(body, Refusal)
    assert isinstance(site._sums._sums._attempt, Over)
    assert not any(any(buffer) for buffer in buffers)
    assert paid(coordinator.federation, ALICE) == {("centre", 0): 1}


def out_of_memory(*_, **__):
    raise MemoryError


def test_a_charge_that_could_not_be_written_may_be_tried_again_in_the_same_attempt(coordinator, monkeypatch):
    """A full disk between the phases: the others have paid, and a moment later there is room again."""
    proposal = coordinator.proposal()
    commitments = coordinator.committed(proposal)
    body = coordinator.contribution(proposal, commitments)
    with monkeypatch.context() as patch:
        patch.setattr("fedgrade.trust.ledger.os.fsync", no_space)
        said = coordinator.ask(ALICE, body, coordinator.head)
    assert (said.kind, said.code) == ("refusal", "ledger")
    assert paid(coordinator.federation, ALICE) == {}
    coordinator.total(proposal, commitments).total()


def no_space(_descriptor):
    raise OSError(28, "No space left on device")
