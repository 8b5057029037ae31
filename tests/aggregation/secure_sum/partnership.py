"""Partners with real keys and real state machines, and an honest coordinator's walk through an attempt."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedgrade.aggregation.secure_sum.coordinator import SumCoordinator, propose
from fedgrade.aggregation.secure_sum.documents import SumCommitments, SumProposal, SumTask
from fedgrade.aggregation.secure_sum.site import MaskedUpload, SumFloor, SumSite
from fedgrade.trust.identity import Roster, SigningKey, SiteId, site_id

TASK = SumTask(
    job="ab" * 32,
    purpose="train",
    round_index=3,
    attempt=0,
    weights_digest="cd" * 32,
    plan_digest="ef" * 32,
    size=5,
    entry_limit=2**40,
    tolerated_dropouts=0,
)
FLOOR = SumFloor(minimum_participants=2, noise_shares=2)
# Signing keys are what a partnership takes longest to make.
KEYS = {site_id(f"site-{number:02d}"): SigningKey.generate() for number in range(12)}
ROSTER = Roster(coordinator=SigningKey.generate().public, sites={site: key.public for site, key in KEYS.items()})


def names(number: int) -> tuple[SiteId, ...]:
    return tuple(KEYS)[:number]


def plain_sum(vectors: Collection[Sequence[int]]) -> list[int]:
    """In Python's integers, which never wrap."""
    return [sum(int(entry) for entry in column) for column in zip(*vectors, strict=True)]


def numbers(site: SiteId, size: int = TASK.size) -> np.ndarray:
    """A vector that only ``site`` would send."""
    return np.arange(size, dtype=np.int64) - 1000 * (1 + tuple(KEYS).index(site))


@dataclass(frozen=True, kw_only=True)
class Partnership:
    """Sites that take part, and the terms they are asked to sign."""

    sites: Mapping[SiteId, SumSite]
    task: SumTask

    @property
    def dropouts(self) -> int:
        return self.task.tolerated_dropouts

    @classmethod
    def of(cls, number: int, *, dropouts: int = 0, task: SumTask = TASK) -> "Partnership":
        sites = {site: SumSite(site=site, key=KEYS[site], roster=ROSTER) for site in names(number)}
        return cls(sites=sites, task=replace(task, tolerated_dropouts=dropouts))

    def attempt(self, attempt: int) -> "Partnership":
        """The same sites, asked for another attempt."""
        return replace(self, task=replace(self.task, attempt=attempt))

    def proposal(self, *, participants: Collection[SiteId] | None = None) -> SumProposal:
        """What an honest coordinator proposes to ``participants``, by default everybody."""
        chosen = tuple(participants or self.sites)
        announced = {site: self.sites[site].announce(self.task.job) for site in chosen if self.dropouts}
        return propose(self.task, chosen, roster=ROSTER, share_keys=announced)

    def commit(self, proposal: SumProposal) -> dict[SiteId, bytes]:
        return {
            site: self.sites[site].commit(proposal, task=self.task, floor=FLOOR) for site in proposal.terms.participants
        }

    def committed(self) -> tuple[SumCoordinator, SumCommitments]:
        """A coordinator to whom everybody has committed, and what it sends next."""
        proposal = self.proposal()
        coordinator = SumCoordinator(proposal.terms, roster=ROSTER)
        for site, raw in self.commit(proposal).items():
            coordinator.accept_commitment(site, raw)
        return coordinator, coordinator.commitments()

    def masked(
        self, vectors: Mapping[SiteId, np.ndarray] | None = None, *, vanish: Collection[SiteId] = ()
    ) -> tuple[SumCoordinator, dict[SiteId, MaskedUpload]]:
        """A coordinator that has the vectors of all but those that ``vanish``, and every upload that was made."""
        coordinator, commitments = self.committed()
        uploads = {}
        for site, machine in self.sites.items():
            machine.confirm(commitments)
            vector = numbers(site, self.task.size) if vectors is None else vectors[site]
            uploads[site] = machine.mask(vector)
            if site not in vanish:
                coordinator.accept_vector(site, uploads[site].document, uploads[site].vector)
        return coordinator, uploads

    def voted(self, coordinator: SumCoordinator) -> None:
        """Every survivor votes as it should."""
        request = coordinator.survivors()
        for site in request.survivors:
            coordinator.accept_vote(site, self.sites[site].vote(request))

    def revealed(self, coordinator: SumCoordinator, *, vanish: Collection[SiteId] = ()) -> None:
        """Every survivor but those that ``vanish`` reveals its shares."""
        request = coordinator.votes()
        for site in request.envelopes:
            if site not in vanish:
                coordinator.accept_shares(site, self.sites[site].reveal(request))

    def total(
        self,
        vectors: Mapping[SiteId, np.ndarray] | None = None,
        *,
        vanish: Collection[SiteId] = (),
        vanish_late: Collection[SiteId] = (),
    ) -> np.ndarray:
        """The total of a whole attempt; sites vanish before their vector arrives, or ``late``, before they reveal."""
        coordinator, _ = self.masked(vectors, vanish=vanish)
        if self.dropouts:
            self.voted(coordinator)
            self.revealed(coordinator, vanish=vanish_late)
        return coordinator.total()
