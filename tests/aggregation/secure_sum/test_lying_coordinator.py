"""Coordinators that lie, driving the real state machines of honest sites."""

from dataclasses import replace

import pytest

from fedgrade.aggregation.secure_sum.coordinator import propose
from fedgrade.aggregation.secure_sum.documents import (
    RevealedShares,
    ShareKey,
    SumCommitment,
    SumCommitments,
    SumSurvivors,
    SumVotes,
    SurvivorVote,
)
from fedgrade.aggregation.secure_sum.site import SumFloor, SumSite
from fedgrade.errors import (
    DocumentRefused,
    MessageRefused,
    PolicyViolated,
    SignatureRefused,
)
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import Roster, SigningKey, site_id
from tests.aggregation.secure_sum.partnership import FLOOR, KEYS, ROSTER, TASK, Partnership, names, numbers, plain_sum

ALICE, BOB, CAROL, DAVE = names(4)
COORDINATOR = SigningKey.generate()


def opened(raw, kind, site):
    return open_sealed(raw, as_=kind, signed_by=KEYS[site].public)


def relayed(commitments, **changed):
    """What the coordinator relays, with some sites' envelopes changed or left out."""
    envelopes = {**commitments.envelopes, **changed}
    return replace(commitments, envelopes={site: raw for site, raw in envelopes.items() if raw is not None})


def refuses_and_stays(machine, commitments, honest, match, error=MessageRefused):
    """The machine refuses ``commitments``, and goes on with the ``honest`` ones as if nothing had been."""
    with pytest.raises(error, match=match):
        machine.confirm(commitments)
    with pytest.raises(MessageRefused, match="out of order"):
        machine.mask(numbers(ALICE))
    machine.confirm(honest)
    machine.mask(numbers(ALICE))


# --- a coordinator that swaps keys and participants ----------------------------------------------------------------


def test_a_key_that_the_coordinator_made_itself_is_refused():
    partnership = Partnership.of(4)
    _, honest = partnership.committed()
    signed_by_bob = opened(honest.envelopes[BOB].encode(), SumCommitment, BOB)
    own = seal(replace(signed_by_bob, public_key="11" * 32), COORDINATOR).decode()
    swapped = relayed(honest, **{BOB: own})
    refuses_and_stays(partnership.sites[ALICE], swapped, honest, "signed by key", SignatureRefused)


def test_a_commitment_that_another_partner_signed_in_bobs_name_is_refused():
    partnership = Partnership.of(4)
    _, honest = partnership.committed()
    signed_by_carol = opened(honest.envelopes[CAROL].encode(), SumCommitment, CAROL)
    in_bobs_name = seal(replace(signed_by_carol, site=BOB), KEYS[CAROL]).decode()
    for site, error, match in ((BOB, SignatureRefused, "signed by key"), (CAROL, MessageRefused, "in the name of")):
        with pytest.raises(error, match=match):
            partnership.sites[ALICE].confirm(relayed(honest, **{site: in_bobs_name}))


def test_two_sites_with_one_key_are_refused():
    partnership = Partnership.of(4)
    _, honest = partnership.committed()
    bob, carol = (opened(honest.envelopes[site].encode(), SumCommitment, site) for site in (BOB, CAROL))
    copied = seal(replace(carol, public_key=bob.public_key), KEYS[CAROL]).decode()
    refuses_and_stays(partnership.sites[ALICE], relayed(honest, **{CAROL: copied}), honest, "two sites have one key")


def test_a_key_with_which_no_secret_can_be_shared_is_refused():
    partnership = Partnership.of(4)
    _, honest = partnership.committed()
    carol = opened(honest.envelopes[CAROL].encode(), SumCommitment, CAROL)
    low_order = seal(replace(carol, public_key="00" * 32), KEYS[CAROL]).decode()
    refuses_and_stays(
        partnership.sites[ALICE], relayed(honest, **{CAROL: low_order}), honest, "no secret can be shared"
    )


def test_sites_of_the_coordinators_own_making_are_refused():
    stranger = site_id("stranger")
    partnership = Partnership.of(3)
    padded = Roster(coordinator=ROSTER.coordinator, sites={**ROSTER.sites, stranger: COORDINATOR.public})
    proposal = propose(TASK, [ALICE, stranger], roster=padded)
    with pytest.raises(SignatureRefused, match="'stranger' is not on the roster"):
        partnership.sites[ALICE].commit(proposal, task=TASK, floor=FLOOR)


def test_a_share_key_that_the_coordinator_made_itself_is_refused():
    partnership = Partnership.of(4, dropouts=1)
    proposal = partnership.proposal()
    own = ShareKey(job=TASK.job, site=BOB, public_key="22" * 32)
    terms = replace(proposal.terms, share_keys={**proposal.terms.share_keys, BOB: own.public_key})
    forged = {**proposal.share_key_envelopes, BOB: seal(own, COORDINATOR).decode()}
    attempts = (
        (replace(proposal, terms=terms), MessageRefused, "share key of site-01: is not the one in the terms"),
        (replace(proposal, terms=terms, share_key_envelopes=forged), SignatureRefused, "signed by key"),
        (replace(proposal, share_key_envelopes={}), MessageRefused, "not of the same sites"),
    )
    for changed, error, match in attempts:
        with pytest.raises(error, match=match):
            partnership.sites[ALICE].commit(changed, task=partnership.task, floor=FLOOR)


def test_a_share_key_from_before_a_restart_or_of_another_job_is_refused():
    partnership = Partnership.of(4, dropouts=1)
    proposal = partnership.proposal()
    restarted = SumSite(site=ALICE, key=KEYS[ALICE], roster=ROSTER)
    with pytest.raises(MessageRefused, match="lost in a restart"):
        restarted.commit(proposal, task=partnership.task, floor=FLOOR)
    announced = {site: machine.announce("77" * 32) for site, machine in partnership.sites.items()}
    with pytest.raises(MessageRefused, match="for job '7777777777777777', not"):
        propose(partnership.task, names(4), roster=ROSTER, share_keys=announced)


# --- a coordinator that shows different sets or replays ------------------------------------------------------------


def test_two_sites_that_were_shown_different_sets_never_mask():
    partnership = Partnership.of(4)
    small, large = partnership.proposal(participants=(ALICE, BOB)), partnership.proposal()
    alice, bob = partnership.sites[ALICE], partnership.sites[BOB]
    by_alice = alice.commit(small, task=TASK, floor=FLOOR)
    by_bob = bob.commit(large, task=TASK, floor=FLOOR)
    shown = SumCommitments(terms_digest=small.terms.digest, envelopes={ALICE: by_alice.decode(), BOB: by_bob.decode()})
    with pytest.raises(MessageRefused, match="commitment of site-01: to other terms"):
        alice.confirm(shown)
    with pytest.raises(MessageRefused, match="to other terms than this site signed"):
        bob.confirm(shown)
    # Nor does a site sign a second set for the same attempt.
    for machine, other in ((alice, large), (bob, small)):
        with pytest.raises(MessageRefused, match="was begun before"):
            machine.commit(other, task=TASK, floor=FLOOR)


def test_a_site_that_signs_two_keys_makes_views_that_do_not_cancel():
    partnership = Partnership.of(4)
    coordinator, honest = partnership.committed()
    carol = opened(honest.envelopes[CAROL].encode(), SumCommitment, CAROL)
    second = seal(replace(carol, public_key=("33" * 32)), KEYS[CAROL]).decode()
    partnership.sites[ALICE].confirm(relayed(honest, **{CAROL: second}))
    upload = partnership.sites[ALICE].mask(numbers(ALICE))
    with pytest.raises(MessageRefused, match="that site was shown something else"):
        coordinator.accept_vector(ALICE, upload.document, upload.vector)


def test_commitments_of_an_earlier_attempt_are_refused():
    partnership = Partnership.of(4)
    _, earlier = partnership.committed()
    _, honest = partnership.attempt(1).committed()
    machine = partnership.sites[ALICE]
    for site in (ALICE, BOB):
        replayed = relayed(honest, **{site: earlier.envelopes[site]})
        with pytest.raises(MessageRefused, match="to other terms"):
            machine.confirm(replayed)
    refuses_and_stays(machine, earlier, honest, "to other terms than this site signed")


def test_a_site_is_not_shown_what_it_signed_before_a_restart():
    partnership = Partnership.of(4)
    proposal = partnership.proposal()
    before = partnership.sites[ALICE].commit(proposal, task=TASK, floor=FLOOR)
    restarted = SumSite(site=ALICE, key=KEYS[ALICE], roster=ROSTER)
    honest = Partnership(sites={**partnership.sites, ALICE: restarted}, task=TASK).commit(proposal)
    envelopes = {site: raw.decode() for site, raw in honest.items()}
    shown = SumCommitments(terms_digest=proposal.terms.digest, envelopes={**envelopes, ALICE: before.decode()})
    with pytest.raises(MessageRefused, match="the one of site-00 is not what this site signed"):
        restarted.confirm(shown)
    restarted.confirm(replace(shown, envelopes=envelopes))


@pytest.mark.parametrize(
    "change", [{"attempt": 0}, {"round_index": 2, "attempt": 5}, {"purpose": "centre", "round_index": 9}]
)
def test_an_attempt_that_is_not_later_than_all_before_is_refused(change):
    partnership = Partnership.of(3).attempt(1)
    partnership.committed()
    machine, stale = partnership.sites[ALICE], replace(TASK, **change)
    with pytest.raises(MessageRefused, match="was begun before, or something later was"):
        machine.commit(propose(stale, names(3), roster=ROSTER), task=stale, floor=FLOOR)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job", "00" * 32),
        ("weights_digest", "00" * 32),
        ("plan_digest", "00" * 32),
        ("purpose", "evaluate"),
        ("round_index", 4),
        ("attempt", 1),
        ("size", 6),
        ("entry_limit", 2**41),
        ("tolerated_dropouts", 1),
    ],
)
def test_terms_that_do_not_follow_from_the_sites_own_job_are_refused(field, value):
    partnership = Partnership.of(4)
    task = replace(TASK, **{field: value})
    proposal = replace(partnership, task=task).proposal()
    with pytest.raises(MessageRefused, match=f"the proposed {field} is not the one that follows from the job"):
        partnership.sites[ALICE].commit(proposal, task=TASK, floor=FLOOR)


@pytest.mark.parametrize("left_out", [ALICE, BOB])
def test_a_commitment_that_is_left_out_is_missed(left_out):
    partnership = Partnership.of(4)
    _, honest = partnership.committed()
    short = relayed(honest, **{left_out: None})
    refuses_and_stays(partnership.sites[ALICE], short, honest, "of 3 sites for 4 participants")


def test_a_set_below_policy_or_with_too_few_shares_of_noise_is_refused():
    partnership = Partnership.of(4)
    machine, proposal = partnership.sites[ALICE], partnership.proposal()
    with pytest.raises(
        PolicyViolated, match="4 participants are sure to be in the total; this site's policy asks for 5"
    ):
        machine.commit(proposal, task=TASK, floor=SumFloor(minimum_participants=5, noise_shares=2))
    with pytest.raises(PolicyViolated, match="4 sites are sure to add noise; the plan counts on 5"):
        machine.commit(proposal, task=TASK, floor=SumFloor(minimum_participants=2, noise_shares=5))
    recovering = Partnership.of(4, dropouts=1)
    # Whose vector is kept back is called vanished: it does not make the total one of four.
    with pytest.raises(PolicyViolated, match="3 participants are sure to be in the total; this site's policy asks"):
        recovering.sites[ALICE].commit(
            recovering.proposal(), task=recovering.task, floor=SumFloor(minimum_participants=4, noise_shares=2)
        )
    with pytest.raises(PolicyViolated, match="3 sites are sure to add noise; the plan counts on 4"):
        recovering.sites[ALICE].commit(
            recovering.proposal(), task=recovering.task, floor=SumFloor(minimum_participants=2, noise_shares=4)
        )


def test_a_site_that_is_not_in_the_set_does_not_sign_it():
    partnership = Partnership.of(4)
    with pytest.raises(MessageRefused, match="site-00 is not among the participants"):
        partnership.sites[ALICE].commit(partnership.proposal(participants=names(4)[1:]), task=TASK, floor=FLOOR)


# --- a coordinator that lies about who survived --------------------------------------------------------------------


def test_a_site_called_alive_here_and_dead_there_is_never_unmasked():
    partnership = Partnership.of(7, dropouts=2)
    coordinator, _ = partnership.masked()
    transcript = coordinator.survivors().transcript
    everyone, without_bob = names(7), tuple(site for site in names(7) if site != BOB)
    votes = {}
    for index, (site, machine) in enumerate(partnership.sites.items()):
        shown = everyone if site == BOB or index % 2 else without_bob
        votes[site] = machine.vote(SumSurvivors(transcript=transcript, survivors=shown)).decode()
        # Asked again about the other set, nobody signs a second time.
        other = without_bob if shown == everyone else everyone
        with pytest.raises(MessageRefused, match="out of order"):
            machine.vote(SumSurvivors(transcript=transcript, survivors=other))
    for survivors in (everyone, without_bob):
        request = SumVotes(transcript=transcript, envelopes={site: votes[site] for site in survivors})
        for machine in partnership.sites.values():
            with pytest.raises(MessageRefused, match=r"for another set|not of exactly"):
                machine.reveal(request)


def test_a_site_does_not_sign_itself_away_nor_too_few_nor_strangers():
    partnership = Partnership.of(7, dropouts=2)
    coordinator, _ = partnership.masked()
    honest = coordinator.survivors()
    for survivors, match in (
        (names(7)[1:], "without site-00, which is alive"),
        (names(4), "4 of 7; the terms need 5"),
        ((*names(7), site_id("stranger")), "must be participants, sorted, each once"),
        ((*names(7), ALICE), "must be participants, sorted, each once"),
        (names(7)[::-1], "must be participants, sorted, each once"),
    ):
        with pytest.raises(MessageRefused, match=match):
            partnership.sites[ALICE].vote(replace(honest, survivors=survivors))
    with pytest.raises(MessageRefused, match="about another attempt"):
        partnership.sites[ALICE].vote(replace(honest, transcript="00" * 32))
    partnership.voted(coordinator)


def test_no_share_leaves_before_every_survivor_has_signed():
    partnership = Partnership.of(7, dropouts=2)
    coordinator, _ = partnership.masked(vanish=(BOB,))
    partnership.voted(coordinator)
    honest, machine = coordinator.votes(), partnership.sites[ALICE]
    dropped = {site: raw for site, raw in honest.envelopes.items() if site != CAROL}
    forged = seal(
        SurvivorVote(transcript=honest.transcript, site=CAROL, survivors=tuple(honest.envelopes)), COORDINATOR
    )
    in_other_name = {**dropped, CAROL: honest.envelopes[DAVE]}
    carols = opened(honest.envelopes[CAROL].encode(), SurvivorVote, CAROL)
    replayed = seal(replace(carols, transcript="00" * 32), KEYS[CAROL])
    misnamed = seal(replace(carols, site=DAVE), KEYS[CAROL])
    for envelopes, error, match in (
        (dropped, MessageRefused, "not of exactly the survivors"),
        ({**honest.envelopes, BOB: honest.envelopes[ALICE]}, MessageRefused, "not of exactly the survivors"),
        ({**dropped, CAROL: forged.decode()}, SignatureRefused, "signed by key"),
        ({**dropped, CAROL: replayed.decode()}, MessageRefused, "is of another attempt"),
        ({**dropped, CAROL: misnamed.decode()}, MessageRefused, "in the name of 'site-03'"),
        (in_other_name, SignatureRefused, "signed by key"),
        ({**dropped, CAROL: "{}"}, DocumentRefused, "SurvivorVote envelope"),
    ):
        with pytest.raises(error, match=match):
            machine.reveal(replace(honest, envelopes=envelopes))
    with pytest.raises(MessageRefused, match="about another attempt"):
        machine.reveal(replace(honest, transcript="00" * 32))
    partnership.revealed(coordinator)
    expected = plain_sum(numbers(site) for site in names(7) if site != BOB)
    assert coordinator.total().tolist() == expected


def test_each_site_reveals_one_of_the_two_shares_and_only_once():
    partnership = Partnership.of(7, dropouts=2)
    coordinator, _ = partnership.masked(vanish=(BOB, CAROL))
    partnership.voted(coordinator)
    votes = coordinator.votes()
    machine = partnership.sites[ALICE]
    revealed = opened(machine.reveal(votes), RevealedShares, ALICE)
    assert set(revealed.key_shares) == {BOB, CAROL}
    assert set(revealed.seed_shares) == set(names(7)) - {BOB, CAROL}
    # A second unmasking: votes for all seven, which the coordinator collected from sites of its own.
    everyone = {
        site: seal(SurvivorVote(transcript=votes.transcript, site=site, survivors=names(7)), KEYS[site]).decode()
        for site in names(7)
    }
    with pytest.raises(MessageRefused, match="out of order; this site's attempt is over"):
        machine.reveal(replace(votes, envelopes=everyone))
    with pytest.raises(MessageRefused, match="out of order; this site's attempt is over"):
        machine.vote(SumSurvivors(transcript=votes.transcript, survivors=names(7)))
    with pytest.raises(MessageRefused, match="out of order"):
        machine.mask(numbers(ALICE))


def test_a_vector_that_is_kept_back_keeps_its_self_mask():
    # The coordinator has Bob's vector, calls him vanished, and gets the shares of his key and all other seeds.
    partnership = Partnership.of(7, dropouts=2)
    coordinator, uploads = partnership.masked(vanish=(BOB,))
    partnership.voted(coordinator)
    partnership.revealed(coordinator)
    key = coordinator._vanished_key(BOB)
    assert key is not None
    assert all(BOB not in revealed.seed_shares for revealed in coordinator._revealed.values())
    with pytest.raises(MessageRefused, match="after survivors were named"):
        coordinator.accept_vector(BOB, uploads[BOB].document, uploads[BOB].vector)


def test_with_a_further_attempt_nothing_of_the_last_can_be_asked():
    partnership = Partnership.of(4, dropouts=1)
    coordinator, _ = partnership.masked()
    stale = coordinator.survivors()
    partnership.attempt(1).masked()
    for machine in partnership.sites.values():
        with pytest.raises(MessageRefused, match="about another attempt"):
            machine.vote(stale)


def test_shares_that_do_not_open_stop_a_site_before_it_masks():
    partnership = Partnership.of(4, dropouts=1)
    _, honest = partnership.committed()
    bob = opened(honest.envelopes[BOB].encode(), SumCommitment, BOB)
    spoilt = {site: bytes(len(share)) for site, share in bob.shares.items()}
    resigned = seal(replace(bob, shares=spoilt), KEYS[BOB]).decode()
    refuses_and_stays(partnership.sites[ALICE], relayed(honest, **{BOB: resigned}), honest, "shares from site-01")
