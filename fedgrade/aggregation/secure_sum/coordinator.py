"""The coordinator's side of one attempt: relay what sites signed, and add up what they masked.

Every ``accept_`` checks one site's document and raises with the state as it was; a driver counts that as silence. Each
step that needs all sites says who is missing. The coordinator is trusted with none of this: sites check everything.
"""

import hashlib
from collections.abc import Collection, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedgrade.aggregation.secure_sum.documents import (
    RevealedShares,
    SumCommitments,
    SumProposal,
    SumSurvivors,
    SumTask,
    SumTerms,
    SumVotes,
)
from fedgrade.aggregation.secure_sum.masks import (
    IntArray,
    Mask,
    Party,
    apply_masks,
    pair_mask,
    public_bytes,
    vector_digest,
)
from fedgrade.aggregation.secure_sum.shares import join
from fedgrade.aggregation.secure_sum.signed import (
    Agreed,
    open_commitment,
    open_commitments,
    open_masked_vector,
    open_revealed,
    open_share_key,
    open_vote,
    require_survivors,
)
from fedgrade.errors import MessageRefused, ModelRefused, RoundFailed
from fedgrade.trust.identity import Roster, SiteId


def propose(
    task: SumTask,
    participants: Collection[SiteId],
    *,
    roster: Roster,
    share_keys: Mapping[SiteId, bytes] | None = None,
) -> SumProposal:
    """The proposal that ``participants`` add up ``task``; ``share_keys`` are what each announced, if it needs to.

    Raises:
        MessageRefused: impossible terms, or a share key is missing or for another job.
        SignatureRefused: a share key is not signed by its site.
    """
    announced = dict(share_keys or {})
    keys = {
        site: open_share_key(raw, job=task.job, site=site, roster=roster).public_key for site, raw in announced.items()
    }
    terms = SumTerms(
        task=task,
        participants=tuple(sorted(participants)),
        share_keys=keys,
    )
    return SumProposal(terms=terms, share_key_envelopes={site: raw.decode() for site, raw in announced.items()})


class SumCoordinator:
    """One attempt, from the proposal that was sent to the total.

    Guarantee: :meth:`total` is the plain integer sum of the included sites' vectors, or is refused.
    """

    def __init__(self, terms: SumTerms, *, roster: Roster) -> None:
        self._terms = terms
        self._roster = roster
        self._commitments: dict[SiteId, bytes] = {}
        self._keys: dict[str, SiteId] = {}
        self._agreed: Agreed | None = None
        self._vectors: dict[SiteId, bytes] = {}
        self._sum: IntArray = np.zeros(terms.task.size, dtype=np.int64)
        self._survivors: tuple[SiteId, ...] = ()
        self._votes: dict[SiteId, bytes] = {}
        self._revealed: dict[SiteId, RevealedShares] = {}
        self._shares: dict[SiteId, bytes] = {}

    def accept_commitment(self, site: SiteId, raw: bytes) -> None:
        """Keep the commitment of ``site``; the first one counts.

        Raises:
            SignatureRefused: not signed by that site.
            MessageRefused: to other terms, of a site that takes no part, or with a key that another site came with.
        """
        self._require_participant(site)
        key = open_commitment(raw, terms=self._terms, site=site, roster=self._roster).public_key
        # Found out here and not when all are relayed: whoever comes second has copied.
        if self._keys.setdefault(key, site) != site:
            raise MessageRefused(f"commitment of {site}: has the key of {self._keys[key]}; each must make its own")
        self._commitments.setdefault(site, raw)

    def commitments(self) -> SumCommitments:
        """What every participant is sent next.

        Raises:
            RoundFailed: names who has not committed itself; a further attempt can go on without them.
        """
        _require_everybody(self._commitments, self._terms.participants, what="commitments")
        self._agreed = open_commitments(self._commitments, terms=self._terms, roster=self._roster)
        envelopes = {site: raw.decode() for site, raw in self._commitments.items()}
        return SumCommitments(terms_digest=self._terms.digest, envelopes=envelopes)

    def accept_vector(self, site: SiteId, document: bytes, vector: IntArray) -> None:
        """Add the masked ``vector`` [size] of ``site`` to the sum, once.

        Raises:
            SignatureRefused: ``document`` is not signed by that site.
            MessageRefused: of another attempt, twice, too late, or not the vector that was signed for.
            ModelRefused: another shape or type.
        """
        self._require_participant(site)
        masked = open_masked_vector(document, agreed=self._agreement(), site=site, roster=self._roster)
        if site in self._vectors or self._survivors:
            raise MessageRefused(f"masked vector of {site}: came a second time, or after survivors were named")
        if vector.shape != self._sum.shape or vector.dtype != np.int64:
            raise ModelRefused(
                f"masked vector of {site}: {vector.dtype} {vector.shape}; {self._sum.size} 64-bit integers expected"
            )
        if vector_digest(vector) != masked.vector_digest:
            raise MessageRefused(f"masked vector of {site}: is not the one that was signed for")
        # Unsigned, so that wrapping around is arithmetic and not an overflow.
        self._sum.view(np.uint64)[:] += vector.view(np.uint64)
        self._vectors[site] = document

    def survivors(self) -> SumSurvivors:
        """Recovery: what every survivor is asked to sign. No vector is accepted any more.

        Raises:
            RoundFailed: too few vectors came; names who is missing.
        """
        agreed = self._agreement()
        if not self._survivors:
            if len(self._vectors) < self._terms.threshold or not self._terms.task.tolerated_dropouts:
                _require_everybody(self._vectors, self._terms.participants, what="masked vectors")
            self._survivors = tuple(sorted(self._vectors))
        return SumSurvivors(transcript=agreed.transcript, survivors=self._survivors)

    def accept_vote(self, site: SiteId, raw: bytes) -> None:
        """Keep the vote of the survivor ``site``.

        Raises:
            SignatureRefused: not signed by that site.
            MessageRefused: for another set or attempt, or not of a survivor.
        """
        self._require_survivor(site)
        open_vote(raw, agreed=self._agreement(), survivors=self._survivors, site=site, roster=self._roster)
        self._votes.setdefault(site, raw)

    def votes(self) -> SumVotes:
        """Recovery: what every survivor is sent before it reveals.

        Raises:
            RoundFailed: names who has not voted; only a further attempt can succeed.
        """
        agreed = self._agreement()
        require_survivors(self._survivors, terms=self._terms)
        _require_everybody(self._votes, self._survivors, what="votes")
        return SumVotes(
            transcript=agreed.transcript, envelopes={site: raw.decode() for site, raw in self._votes.items()}
        )

    def accept_shares(self, site: SiteId, raw: bytes) -> None:
        """Keep what the survivor ``site`` revealed.

        Raises:
            SignatureRefused: not signed by that site.
            MessageRefused: for another set or attempt, or not of a survivor.
        """
        self._require_survivor(site)
        revealed = open_revealed(
            raw, agreed=self._agreement(), survivors=self._survivors, site=site, roster=self._roster
        )
        self._revealed.setdefault(site, revealed)
        self._shares.setdefault(site, raw)

    @property
    def signed(self) -> dict[str, dict[SiteId, str]]:
        """By kind and site, everything that was accepted, as it was signed; the vectors are not in it."""
        kinds = {
            "commitments": self._commitments,
            "vectors": self._vectors,
            "votes": self._votes,
            "revealed": self._shares,
        }
        return {kind: {site: raw.decode() for site, raw in kept.items()} for kind, kept in kinds.items()}

    @property
    def included(self) -> tuple[SiteId, ...]:
        """Whose vectors :meth:`total` adds up."""
        return tuple(sorted(self._vectors))

    def total(self) -> IntArray:
        """The plain integer sum [size] of the included sites' vectors.

        Raises:
            RoundFailed: vectors or shares are missing, shares were altered, or masks did not cancel.
        """
        total = self._sum
        if self._terms.task.tolerated_dropouts:
            masks = self._leftover_masks()
            total = apply_masks(total, masks)
            for mask in masks:
                mask.wipe()
        else:
            _require_everybody(self._vectors, self._terms.participants, what="masked vectors")
        limit = len(self.included) * self._terms.task.entry_limit
        if int(total.max()) > limit or int(total.min()) < -limit:
            raise RoundFailed(
                f"secure sum: the total has a number beyond {limit}; some site did not mask as agreed, and a further "
                "attempt is needed"
            )
        return np.array(total)

    def _leftover_masks(self) -> tuple[Mask, ...]:
        """What undoes survivors' self masks, and their masks against sites that vanished."""
        agreed, participants = self._agreement(), self._terms.participants
        if len(self._revealed) < self._terms.threshold:
            raise RoundFailed(
                f"secure sum: {len(self._revealed)} sites revealed shares; {self._terms.threshold} are needed"
            )
        masks = [Mask(seed=self._seed(site), negative=True) for site in self._survivors]
        parties = {
            site: Party(site=site, public_key=bytes.fromhex(commitment.public_key))
            for site, commitment in agreed.commitments.items()
        }
        for vanished in sorted(set(participants) - set(self._survivors)):
            key = self._vanished_key(vanished)
            # What the vanished site would have added is the opposite of what each survivor did add.
            masks += [
                pair_mask(key, own=parties[vanished], other=parties[site], transcript=agreed.transcript)
                for site in self._survivors
            ]
        return tuple(masks)

    def _seed(self, site: SiteId) -> bytearray:
        seed = self._joined({of: revealed.seed_shares[site] for of, revealed in self._revealed.items()}, of=site)
        if hashlib.sha256(seed).hexdigest() != self._agreement().commitments[site].seed_digest:
            raise RoundFailed(f"secure sum: shares of the seed of {site} were altered; a further attempt is needed")
        return seed

    def _vanished_key(self, site: SiteId) -> X25519PrivateKey:
        raw = self._joined({of: revealed.key_shares[site] for of, revealed in self._revealed.items()}, of=site)
        key = X25519PrivateKey.from_private_bytes(raw)
        if public_bytes(key).hex() != self._agreement().commitments[site].public_key:
            raise RoundFailed(f"secure sum: shares of the key of {site} were altered; a further attempt is needed")
        return key

    def _joined(self, shares: Mapping[SiteId, bytes], *, of: SiteId) -> bytearray:
        enough = sorted(shares)[: self._terms.threshold]
        try:
            return join({self._terms.number(holder): shares[holder] for holder in enough})
        except MessageRefused as error:
            raise RoundFailed(f"secure sum: shares of {of} were altered; a further attempt is needed") from error

    def _agreement(self) -> Agreed:
        if self._agreed is None:
            raise MessageRefused("secure sum: out of order; commitments come first")
        return self._agreed

    def _require_participant(self, site: SiteId) -> None:
        if site not in self._terms.participants:
            raise MessageRefused(f"secure sum: {site} takes no part in this attempt")

    def _require_survivor(self, site: SiteId) -> None:
        if site not in self._survivors:
            raise MessageRefused(f"secure sum: {site} is not among the survivors of this attempt")


def _require_everybody(present: Collection[SiteId], wanted: Collection[SiteId], *, what: str) -> None:
    missing = sorted(set(wanted) - set(present))
    if missing:
        raise RoundFailed(
            f"secure sum: {what} of {', '.join(missing)} are missing; a further attempt can go on without them"
        )
