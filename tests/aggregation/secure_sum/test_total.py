import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgrade.aggregation.secure_sum.documents import SumProposal, SumTask
from fedgrade.aggregation.secure_sum.site import SumSite
from fedgrade.errors import RoundFailed
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.identity import SiteId
from tests.aggregation.secure_sum.partnership import KEYS, ROSTER, TASK, Partnership, names, numbers, plain_sum


def largest(sites: int) -> int:
    """The largest entry with which no total of so many wraps."""
    return (2**63 - 1) // sites


@st.composite
def parties(draw, *, dropouts):
    """Sites, a vector for each up to the very limit, and how many may vanish."""
    tolerated = draw(st.integers(1, 3)) if dropouts else 0
    sites = draw(st.integers(3 * tolerated + 1 if tolerated else 2, 10))
    limit = draw(st.sampled_from([0, 1, 2**20, 2**40, largest(sites)]))
    size = draw(st.sampled_from([1, 2, 7, 40]))
    task = SumTask(**{**vars(TASK), "size": size, "entry_limit": limit})
    entries = st.integers(-limit, limit) | st.sampled_from([-limit, limit])
    vectors = {site: draw(arrays.arrays(np.int64, size, elements=entries)) for site in names(sites)}
    return Partnership.of(sites, dropouts=tolerated, task=task), vectors


@settings(max_examples=60)
@given(parties(dropouts=False))
def test_the_total_is_the_plain_integer_sum_bit_for_bit(case):
    partnership, vectors = case
    total = partnership.total(vectors)
    assert total.dtype == np.int64
    assert total.tolist() == plain_sum(vectors.values())


@settings(max_examples=30)
@given(parties(dropouts=True), st.data())
def test_whoever_vanishes_within_what_is_tolerated_the_rest_add_up_exactly(case, data):
    partnership, vectors = case
    gone = data.draw(st.lists(st.sampled_from(names(len(vectors))), unique=True, max_size=partnership.dropouts))
    early = data.draw(st.integers(0, len(gone)))
    total = partnership.total(vectors, vanish=gone[:early], vanish_late=gone[early:])
    assert total.tolist() == plain_sum(vector for site, vector in vectors.items() if site not in gone[:early])


@given(st.integers(0, 5), st.integers(1, 3))
@settings(max_examples=20)
def test_one_site_more_than_is_tolerated_ends_the_attempt(early, dropouts):
    sites = names(3 * dropouts + 1)
    early = min(early, dropouts + 1)
    partnership = Partnership.of(len(sites), dropouts=dropouts)
    with pytest.raises(RoundFailed, match=r"missing|are needed"):
        partnership.total(vanish=sites[:early], vanish_late=sites[early : dropouts + 1])


@pytest.mark.parametrize("size", [1, 2**14 - 1, 2**14, 2**14 + 1, 3 * 2**14 + 5])
def test_vectors_of_every_length_around_a_block_add_up(size):
    partnership = Partnership.of(3, task=SumTask(**{**vars(TASK), "size": size}))
    expected = sum(numbers(site, size) for site in partnership.sites)
    np.testing.assert_array_equal(partnership.total(), expected)


@pytest.mark.parametrize("dropouts", [0, 2])
def test_attempts_follow_one_another_with_the_same_sites(dropouts):
    partnership = Partnership.of(7, dropouts=dropouts)
    expected = plain_sum(numbers(site) for site in partnership.sites)
    for attempt in range(3):
        assert partnership.attempt(attempt).total().tolist() == expected


def test_all_or_nothing_names_who_is_missing_in_each_phase():
    partnership = Partnership.of(3)
    proposal = partnership.proposal()
    coordinator, _ = partnership.masked(vanish=names(1))
    with pytest.raises(RoundFailed, match="masked vectors of site-00 are missing"):
        coordinator.total()
    again = partnership.attempt(1)
    coordinator = type(coordinator)(again.proposal().terms, roster=ROSTER)
    for site, raw in again.commit(again.proposal()).items():
        if site != names(3)[2]:
            coordinator.accept_commitment(site, raw)
    with pytest.raises(RoundFailed, match="commitments of site-02 are missing"):
        coordinator.commitments()
    assert proposal.terms.participants == names(3)


def test_a_survivor_that_does_not_vote_ends_the_attempt():
    partnership = Partnership.of(4, dropouts=1)
    coordinator, _ = partnership.masked(vanish=names(1))
    request = coordinator.survivors()
    for site in names(4)[1:3]:
        coordinator.accept_vote(site, partnership.sites[site].vote(request))
    with pytest.raises(RoundFailed, match="votes of site-03 are missing"):
        coordinator.votes()


def test_a_further_attempt_goes_on_without_the_site_that_vanished():
    partnership = Partnership.of(4)
    coordinator, _ = partnership.masked(vanish=names(1))
    with pytest.raises(RoundFailed):
        coordinator.total()
    rest = Partnership(sites=dict(list(partnership.sites.items())[1:]), task=TASK).attempt(1)
    assert rest.total().tolist() == plain_sum(numbers(site) for site in rest.sites)


def test_a_site_that_restarts_refuses_the_attempt_and_takes_part_in_the_next():
    partnership = Partnership.of(4, dropouts=1)
    _, commitments = partnership.committed()
    first = names(1)[0]
    restarted = SumSite(site=first, key=KEYS[first], roster=ROSTER)
    with pytest.raises(Exception, match="out of order; this site's attempt is over"):
        restarted.confirm(commitments)
    further = Partnership(sites={**partnership.sites, first: restarted}, task=partnership.task).attempt(1)
    assert further.total(vanish=names(4)[3:]).tolist() == plain_sum(numbers(site) for site in names(3))


def test_every_message_is_as_long_whatever_the_numbers_are():
    def lengths(vector):
        partnership = Partnership.of(7, dropouts=2)
        proposal = partnership.proposal()
        commitments = partnership.commit(proposal)
        coordinator, uploads = partnership.attempt(1).masked(dict.fromkeys(names(7), vector), vanish=names(1))
        partnership.voted(coordinator)
        votes = coordinator.votes()
        revealed = partnership.sites[names(2)[1]].reveal(votes)
        sent = [*commitments.values(), *(upload.document for upload in uploads.values()), encode(votes), revealed]
        return [len(raw) for raw in sent] + [upload.vector.nbytes for upload in uploads.values()]

    zeros, full = np.zeros(TASK.size, dtype=np.int64), np.full(TASK.size, TASK.entry_limit, dtype=np.int64)
    assert lengths(zeros) == lengths(full)


def test_what_the_coordinator_says_survives_the_wire():
    partnership = Partnership.of(4, dropouts=1)
    proposal = partnership.proposal()
    assert decode(SumProposal, encode(proposal)) == proposal
    assert json.loads(encode(proposal))["kind"] == "sum_proposal"
    coordinator, _ = partnership.masked(vanish=names(1))
    partnership.voted(coordinator)
    for document in (coordinator.commitments(), coordinator.survivors(), coordinator.votes()):
        assert decode(type(document), encode(document)) == document
    assert coordinator.included == tuple(SiteId(name) for name in names(4)[1:])


def test_the_same_question_gets_the_same_bytes():
    partnership = Partnership.of(4, dropouts=1)
    proposal = partnership.proposal()
    assert partnership.commit(proposal) == partnership.commit(proposal)
    coordinator, _ = partnership.attempt(1).masked()
    partnership.voted(coordinator)
    survivors, votes = coordinator.survivors(), coordinator.votes()
    for machine in partnership.sites.values():
        assert machine.vote(survivors) == machine.vote(survivors)
        assert machine.reveal(votes) == machine.reveal(votes)
