"""Sites that cheat the coordinator, or one another, driving the real state machines of honest ones."""

from dataclasses import replace

import numpy as np
import pytest

from fedgrade.aggregation.secure_sum.coordinator import SumCoordinator, propose
from fedgrade.aggregation.secure_sum.documents import (
    MAX_VOUCHER_BYTES,
    MaskedVector,
    RevealedShares,
    ShareKey,
    SumCommitment,
    SumCommitments,
    SumSurvivors,
    SumVotes,
    SurvivorVote,
)
from fedgrade.aggregation.secure_sum.masks import vector_digest
from fedgrade.aggregation.secure_sum.site import SumSite
from fedgrade.errors import AttemptOver, DocumentRefused, FedgradeError, MessageRefused, RoundFailed
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import site_id
from tests.aggregation.secure_sum.partnership import FLOOR, KEYS, ROSTER, TASK, Partnership, names, numbers, plain_sum

ALICE, BOB, CAROL, DAVE = names(4)


def opened(raw, kind, site):
    return open_sealed(raw, as_=kind, signed_by=KEYS[site].public)


def test_garbage_instead_of_any_document_is_one_clear_refusal():
    partnership = Partnership.of(4, dropouts=1)
    coordinator, uploads = partnership.masked(vanish=(BOB,))
    coordinator.survivors()
    vector = uploads[BOB].vector
    for garbage in (b"", b"{}", b"\xff" * 99, b'{"payload":1}', uploads[ALICE].document, seal(TASK, KEYS[ALICE])):
        for accept in (coordinator.accept_commitment, coordinator.accept_vote, coordinator.accept_shares):
            with pytest.raises(FedgradeError):
                accept(ALICE, garbage)
        with pytest.raises(FedgradeError):
            coordinator.accept_vector(BOB, garbage, vector)


@pytest.mark.parametrize(
    ("vector", "match"),
    [
        (np.zeros(4, dtype=np.int64), "5 64-bit integers expected"),
        (np.zeros((5, 1), dtype=np.int64), "5 64-bit integers expected"),
        (np.zeros(5, dtype=np.float64), "5 64-bit integers expected"),
        (np.zeros(5, dtype=np.int64), "not the one that was signed for"),
    ],
)
def test_a_vector_of_another_length_type_or_content_is_not_added(vector, match):
    partnership = Partnership.of(3)
    coordinator, uploads = partnership.masked(vanish=(BOB,))
    with pytest.raises(FedgradeError, match=match):
        coordinator.accept_vector(BOB, uploads[BOB].document, vector)
    coordinator.accept_vector(BOB, uploads[BOB].document, uploads[BOB].vector)
    assert coordinator.total().tolist() == plain_sum(numbers(site) for site in names(3))


def test_a_vector_of_an_earlier_attempt_or_a_second_one_is_not_added():
    partnership = Partnership.of(3)
    _, earlier = partnership.masked()
    coordinator, uploads = partnership.attempt(1).masked()
    with pytest.raises(MessageRefused, match="of another attempt"):
        coordinator.accept_vector(BOB, earlier[BOB].document, earlier[BOB].vector)
    with pytest.raises(MessageRefused, match="came a second time"):
        coordinator.accept_vector(BOB, uploads[BOB].document, uploads[BOB].vector)
    stranger = names(4)[3]
    with pytest.raises(MessageRefused, match="takes no part"):
        coordinator.accept_vector(stranger, uploads[BOB].document, uploads[BOB].vector)
    assert coordinator.total().tolist() == plain_sum(numbers(site) for site in names(3))


def test_a_site_that_does_not_mask_as_agreed_is_noticed_by_the_range():
    partnership = Partnership.of(3)
    coordinator, uploads = partnership.masked(vanish=(BOB,))
    document = opened(uploads[BOB].document, MaskedVector, BOB)
    plain = numbers(BOB)
    signed = seal(replace(document, vector_digest=vector_digest(plain)), KEYS[BOB])
    coordinator.accept_vector(BOB, signed, plain)
    with pytest.raises(RoundFailed, match="did not mask as agreed"):
        coordinator.total()


def test_a_site_masks_nothing_that_could_wrap_or_does_not_fit():
    partnership = Partnership.of(3)
    _, commitments = partnership.committed()
    machine = partnership.sites[ALICE]
    machine.confirm(commitments)
    for vector in (
        np.full(5, TASK.entry_limit + 1),
        np.full(5, -(2**63)),
        np.zeros(6, dtype=np.int64),
        np.zeros(5, dtype=np.int32),
    ):
        with pytest.raises(FedgradeError, match=r"entry_limit|64-bit integers expected"):
            machine.mask(vector)
    machine.mask(np.full(5, -TASK.entry_limit))


@pytest.mark.parametrize("part", ["seed_shares", "key_shares"])
def test_a_revealed_share_that_was_altered_names_whose_secret_it_spoils(part):
    partnership = Partnership.of(4, dropouts=1)
    coordinator, _ = partnership.masked(vanish=(DAVE,))
    partnership.voted(coordinator)
    votes = coordinator.votes()
    for site in names(3):
        raw = partnership.sites[site].reveal(votes)
        if site == BOB:
            honest = opened(raw, RevealedShares, BOB)
            of = DAVE if part == "key_shares" else CAROL
            altered = {**getattr(honest, part), of: bytes(33)}
            raw = seal(replace(honest, **{part: altered}), KEYS[BOB])
        coordinator.accept_shares(site, raw)
    with pytest.raises(RoundFailed, match=f"of {of} were altered"):
        coordinator.total()


def test_shares_of_the_wrong_sites_or_length_are_refused():
    partnership = Partnership.of(4, dropouts=1)
    coordinator, _ = partnership.masked(vanish=(DAVE,))
    partnership.voted(coordinator)
    raw = partnership.sites[BOB].reveal(coordinator.votes())
    honest = opened(raw, RevealedShares, BOB)
    for changes in (
        {"key_shares": {**honest.key_shares, CAROL: bytes(33)}},
        {"seed_shares": {**honest.seed_shares, DAVE: bytes(33)}},
        {"seed_shares": {ALICE: bytes(33)}},
        {"key_shares": {}},
    ):
        wrong = resigned(raw, RevealedShares, **changes)
        with pytest.raises(MessageRefused, match="not one of each survivor's seed and each vanished site's key"):
            coordinator.accept_shares(BOB, wrong)
    with pytest.raises(MessageRefused, match="each takes 33 bytes"):
        replace(honest, key_shares={DAVE: bytes(32)})
    with pytest.raises(MessageRefused, match="not among the survivors"):
        coordinator.accept_shares(DAVE, raw)


def test_no_document_passes_for_one_of_another_kind():
    partnership = Partnership.of(4, dropouts=1)
    coordinator, uploads = partnership.masked()
    coordinator.survivors()
    for accept in (coordinator.accept_vote, coordinator.accept_shares, coordinator.accept_commitment):
        with pytest.raises(DocumentRefused, match="payload type"):
            accept(ALICE, uploads[ALICE].document)


def test_steps_out_of_order_are_refused_on_both_sides():
    partnership = Partnership.of(4, dropouts=1)
    proposal = partnership.proposal()
    machine = partnership.sites[ALICE]
    coordinator = SumCoordinator(proposal.terms, roster=ROSTER)
    survivors = SumSurvivors(transcript="00" * 32, survivors=names(4))
    votes = SumVotes(transcript="00" * 32, envelopes={})
    commitments = SumCommitments(terms_digest=proposal.terms.digest, envelopes={})
    for step in (
        lambda: machine.confirm(commitments),
        lambda: machine.mask(numbers(ALICE)),
        lambda: machine.vote(survivors),
        lambda: machine.reveal(votes),
        coordinator.survivors,
        coordinator.votes,
        lambda: coordinator.accept_vector(ALICE, b"", numbers(ALICE)),
    ):
        with pytest.raises(MessageRefused, match="out of order"):
            step()
    with pytest.raises(MessageRefused, match="not among the survivors"):
        coordinator.accept_vote(ALICE, b"")
    with pytest.raises(RoundFailed, match="0 sites revealed shares; 3 are needed"):
        Partnership.of(4, dropouts=1).masked()[0].total()


def test_a_commitment_with_shares_for_the_wrong_sites_is_not_accepted():
    partnership = Partnership.of(4, dropouts=1)
    proposal = partnership.proposal()
    coordinator = SumCoordinator(proposal.terms, roster=ROSTER)
    honest = opened(partnership.commit(proposal)[BOB], SumCommitment, BOB)
    short = {site: share for site, share in honest.shares.items() if site != CAROL}
    for spoilt in (replace(honest, shares=short), replace(honest, seed_digest=""), replace(honest, shares={})):
        with pytest.raises(MessageRefused, match="commitment of site-01: has shares for"):
            coordinator.accept_commitment(BOB, seal(spoilt, KEYS[BOB]))


def test_a_revealed_value_beyond_the_field_names_whose_secret_it_spoils():
    partnership = Partnership.of(4, dropouts=1)
    coordinator, _ = partnership.masked()
    partnership.voted(coordinator)
    votes = coordinator.votes()
    for site in names(4):
        revealed = opened(partnership.sites[site].reveal(votes), RevealedShares, site)
        if site == ALICE:
            revealed = replace(revealed, seed_shares={**revealed.seed_shares, DAVE: b"\xff" * 33})
        coordinator.accept_shares(site, seal(revealed, KEYS[site]))
    with pytest.raises(RoundFailed, match="shares of site-03 were altered"):
        coordinator.total()


def resigned(raw, kind, **changes):
    """Bob's document with some fields changed, signed by Bob again."""
    return seal(replace(opened(raw, kind, BOB), **changes), KEYS[BOB])


def test_a_document_in_another_sites_name_or_of_another_attempt_is_not_accepted():
    partnership = Partnership.of(4, dropouts=1)
    coordinator, uploads = partnership.masked(vanish=(BOB,))
    renamed = resigned(uploads[BOB].document, MaskedVector, site=ALICE)
    with pytest.raises(MessageRefused, match="masked vector of site-01: is in the name of 'site-00'"):
        coordinator.accept_vector(BOB, renamed, uploads[BOB].vector)
    coordinator.accept_vector(BOB, uploads[BOB].document, uploads[BOB].vector)
    survivors = coordinator.survivors()
    vote = partnership.sites[BOB].vote(survivors)
    for change, match in (
        ({"site": ALICE}, "vote of site-01: is in"),
        ({"transcript": "00" * 32}, "of another attempt"),
    ):
        with pytest.raises(MessageRefused, match=match):
            coordinator.accept_vote(BOB, resigned(vote, SurvivorVote, **change))
    partnership.voted(coordinator)
    revealed = partnership.sites[BOB].reveal(coordinator.votes())
    for change, match in (
        ({"site": ALICE}, "shares of site-01: is in"),
        ({"transcript": "00" * 32}, "of another attempt"),
    ):
        with pytest.raises(MessageRefused, match=match):
            coordinator.accept_shares(BOB, resigned(revealed, RevealedShares, **change))


def test_a_share_key_in_another_sites_name_is_not_accepted():
    partnership = Partnership.of(4, dropouts=1)
    announced = {site: machine.announce(TASK.job) for site, machine in partnership.sites.items()}
    announced[BOB] = resigned(announced[BOB], ShareKey, site=ALICE)
    with pytest.raises(MessageRefused, match="share key of site-01: is in the name of 'site-00'"):
        propose(partnership.task, names(4), roster=ROSTER, share_keys=announced)


def test_of_two_commitments_of_one_site_the_first_counts():
    partnership = Partnership.of(3)
    proposal = partnership.proposal()
    coordinator = SumCoordinator(proposal.terms, roster=ROSTER)
    first = partnership.commit(proposal)
    for site, raw in first.items():
        coordinator.accept_commitment(site, raw)
    coordinator.accept_commitment(BOB, resigned(first[BOB], SumCommitment, public_key="44" * 32))
    assert {site: raw.encode() for site, raw in coordinator.commitments().envelopes.items()} == first


@pytest.mark.parametrize("sign", [1, -1])
def test_a_total_beyond_the_range_on_either_side_is_refused(sign):
    # Bob's masks are right, and his number is one that no honest site may send.
    partnership = Partnership.of(3)
    honest = {site: np.zeros(TASK.size, dtype=np.int64) for site in names(3)}
    coordinator, uploads = partnership.masked(honest, vanish=(BOB,))
    vector = uploads[BOB].vector + sign * (3 * TASK.entry_limit + 1)
    coordinator.accept_vector(
        BOB, resigned(uploads[BOB].document, MaskedVector, vector_digest=vector_digest(vector)), vector
    )
    with pytest.raises(RoundFailed, match="did not mask as agreed"):
        coordinator.total()


# --- what one site would have all others refuse, the coordinator does not relay --------------------------------------

LOW_ORDER = bytes(32).hex()


def recommitted(coordinator, site, change):
    """The honest commitment of ``site``, changed and signed anew."""
    raw = coordinator.signed["commitments"][site].encode()
    return change(opened(raw, SumCommitment, site))


@pytest.mark.parametrize("dropouts", [0, 1])
def test_a_key_that_shares_no_secret_is_refused_by_the_coordinator_as_by_every_site(dropouts):
    partnership = Partnership.of(4, dropouts=dropouts)
    honest, commitments = partnership.committed()
    weak = seal(recommitted(honest, BOB, lambda one: replace(one, public_key=LOW_ORDER)), KEYS[BOB])
    coordinator = SumCoordinator(partnership.proposal().terms, roster=ROSTER)
    with pytest.raises(MessageRefused, match="commitment of site-01: X25519 key 0000000000000000…: no secret"):
        coordinator.accept_commitment(BOB, weak)
    relayed = replace(commitments, envelopes={**commitments.envelopes, BOB: weak.decode()})
    with pytest.raises(MessageRefused, match="commitment of site-01: X25519 key"):
        partnership.sites[ALICE].confirm(relayed)


def test_a_share_key_that_shares_no_secret_is_in_no_proposal():
    partnership = Partnership.of(4, dropouts=1)
    announced = {site: machine.announce(partnership.task.job) for site, machine in partnership.sites.items()}
    weak = seal(ShareKey(job=partnership.task.job, site=BOB, public_key=LOW_ORDER), KEYS[BOB])
    with pytest.raises(MessageRefused, match="share key of site-01: X25519 key"):
        propose(partnership.task, names(4), roster=ROSTER, share_keys={**announced, BOB: weak})


def test_whoever_comes_second_with_a_key_has_copied_it():
    partnership = Partnership.of(4)
    honest, _ = partnership.committed()
    coordinator = SumCoordinator(partnership.proposal().terms, roster=ROSTER)
    alice = honest.signed["commitments"][ALICE].encode()
    coordinator.accept_commitment(ALICE, alice)
    key = opened(alice, SumCommitment, ALICE).public_key
    copied = seal(recommitted(honest, BOB, lambda one: replace(one, public_key=key)), KEYS[BOB])
    with pytest.raises(MessageRefused, match="commitment of site-01: has the key of site-00"):
        coordinator.accept_commitment(BOB, copied)
    coordinator.accept_commitment(ALICE, alice)
    coordinator.accept_commitment(BOB, honest.signed["commitments"][BOB].encode())


@pytest.mark.parametrize("dropouts", [0, 1])
def test_a_document_longer_than_any_honest_one_is_refused_however_it_is_spelt(dropouts):
    partnership = Partnership.of(4, dropouts=dropouts)
    honest, _ = partnership.committed()
    coordinator = SumCoordinator(partnership.proposal().terms, roster=ROSTER)
    raw = honest.signed["commitments"][BOB]
    assert len(raw) <= partnership.proposal().terms.document_limit
    with pytest.raises(DocumentRefused, match="bytes; the limit is"):
        coordinator.accept_commitment(BOB, raw.replace(",", "," + 2**13 * " ", 1).encode())
    if dropouts:
        with pytest.raises(MessageRefused, match="seed digest of 'site-01'"):
            recommitted(honest, BOB, lambda one: replace(one, seed_digest="00"))


def test_no_honest_document_comes_near_the_limit_however_long_its_sites_names_are():
    # Names as long as they may be; votes and reveals are shorter than commitments, which carry the shares.
    longest = {site_id("s" * 61 + f"{number:02d}"): key for number, key in enumerate(KEYS.values())}
    roster = replace(ROSTER, sites={site: key.public for site, key in longest.items()})
    sites = {site: SumSite(site=site, key=key, roster=roster) for site, key in longest.items()}
    task = replace(TASK, tolerated_dropouts=3)
    proposal = propose(
        task, longest, roster=roster, share_keys={site: machine.announce(task.job) for site, machine in sites.items()}
    )
    coordinator = SumCoordinator(proposal.terms, roster=roster)
    for site, machine in sites.items():
        coordinator.accept_commitment(site, machine.commit(proposal, task=task, floor=FLOOR))
    commitments = coordinator.commitments()
    for site, machine in sites.items():
        machine.confirm(commitments)
        upload = machine.mask(numbers(names(1)[0]))
        coordinator.accept_vector(site, upload.document, upload.vector)
    survivors = coordinator.survivors()
    for site, machine in sites.items():
        coordinator.accept_vote(site, machine.vote(survivors))
    votes = coordinator.votes()
    for site, machine in sites.items():
        coordinator.accept_shares(site, machine.reveal(votes))
    lengths = {kind: max(map(len, raw.values())) for kind, raw in coordinator.signed.items()}
    assert 1.2 * max(lengths.values()) < proposal.terms.document_limit
    assert 1.5 * lengths["vectors"] < MAX_VOUCHER_BYTES


def test_the_same_commitments_are_agreed_to_again_until_something_is_masked():
    partnership = Partnership.of(4, dropouts=1)
    coordinator, commitments = partnership.committed()
    alice = partnership.sites[ALICE]
    agreed = alice.confirm(commitments)
    assert alice.confirm(commitments) is agreed
    with pytest.raises(AttemptOver, match="out of order"):
        alice.confirm(replace(commitments, terms_digest="00" * 32))
    alice.mask(numbers(ALICE))
    with pytest.raises(AttemptOver, match="out of order"):
        alice.confirm(commitments)
    assert coordinator.included == ()
