"""What proves a total afterwards: everything that sites signed in the attempt. Whoever has it adds up again."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedgrade.aggregation.secure_sum.coordinator import SumCoordinator
from fedgrade.aggregation.secure_sum.documents import SumTerms, transcript_of
from fedgrade.aggregation.secure_sum.masks import IntArray
from fedgrade.trust.identity import Roster, SiteId


@dataclass(frozen=True, kw_only=True)
class SumEvidence:
    """The terms, and by site what it signed: its commitment, masked vector, vote and revealed shares.

    The last two are empty unless dropouts were tolerated. The vectors themselves are kept beside this.
    """

    terms: SumTerms
    commitments: dict[SiteId, str]
    vectors: dict[SiteId, str]
    votes: dict[SiteId, str]
    revealed: dict[SiteId, str]

    @property
    def transcript(self) -> str:
        """Which attempt this is."""
        return transcript_of(self.terms, {site: raw.encode() for site, raw in self.commitments.items()})


def retotal(evidence: SumEvidence, vectors: Mapping[SiteId, IntArray], *, roster: Roster) -> IntArray:
    """The total [size] of the masked ``vectors``, by the same steps as in the attempt itself.

    Raises:
        SignatureRefused: something is not signed by whom it should be.
        MessageRefused, ModelRefused: something is missing, for another attempt, or not the vector that was signed for.
        RoundFailed: the masks do not cancel.
    """
    coordinator = SumCoordinator(evidence.terms, roster=roster)
    for site, raw in evidence.commitments.items():
        coordinator.accept_commitment(site, raw.encode())
    coordinator.commitments()
    for site, raw in evidence.vectors.items():
        coordinator.accept_vector(site, raw.encode(), vectors[site])
    if evidence.terms.task.tolerated_dropouts:
        coordinator.survivors()
        for site, raw in evidence.votes.items():
            coordinator.accept_vote(site, raw.encode())
        coordinator.votes()
        for site, raw in evidence.revealed.items():
            coordinator.accept_shares(site, raw.encode())
    return coordinator.total()
