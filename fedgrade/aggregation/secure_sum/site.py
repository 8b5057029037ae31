"""A site's side of the secure sum: what it signs, when it masks, and what it reveals, in that order and once each.

The driver hands over what the coordinator sent, decoded, and carries replies back. It must charge between
:meth:`SumSite.confirm` and :meth:`SumSite.mask`. A refusal leaves the state as it was. The rules have the numbers of
docs/secure-sum.md.
"""

import hashlib
import secrets
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedgrade.aggregation.secure_sum.documents import (
    MaskedVector,
    RevealedShares,
    ShareKey,
    SumCommitment,
    SumCommitments,
    SumProposal,
    SumSurvivors,
    SumTask,
    SumTerms,
    SumVotes,
    SurvivorVote,
)
from fedgrade.aggregation.secure_sum.masks import (
    SEED_BYTES,
    IntArray,
    Mask,
    Party,
    apply_masks,
    pair_mask,
    public_bytes,
    vector_digest,
)
from fedgrade.aggregation.secure_sum.shares import open_shares, seal_shares, share_cipher, split
from fedgrade.aggregation.secure_sum.signed import (
    Agreed,
    open_commitments,
    open_share_key,
    open_vote,
    require_survivors,
)
from fedgrade.aggregation.secure_sum.states import Attempt, Committed, Confirmed, Held, Masked, Over, Voted
from fedgrade.errors import AttemptOver, MessageRefused, ModelRefused, PolicyViolated
from fedgrade.trust.canonical import digest, encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import Roster, SigningKey, SiteId

State = TypeVar("State", Committed, Confirmed, Masked, Voted)


@dataclass(frozen=True, kw_only=True)
class SumFloor:
    """What a site insists on before it adds its vector to others'.

    Attributes:
        minimum_participants: of how many sites a total must be, by the partner's own policy.
        noise_shares: how many sites' noise the job's plan counts on.
    """

    minimum_participants: int
    noise_shares: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedUpload:
    """What leaves in the second phase: the masked ``vector`` [size], and the ``document`` that vouches for it."""

    document: bytes
    vector: IntArray


class SumSite:
    """One site's part in one attempt after another, of one job at a time; called by one thread at a time.

    Guarantee: in any one attempt it signs one set of participants, masks one vector, votes for one set of survivors,
    and reveals at most one of the two shares that it holds of each site.
    """

    def __init__(self, *, site: SiteId, key: SigningKey, roster: Roster) -> None:
        self._site = site
        self._key = key
        self._roster = roster
        self._share_key = ("", X25519PrivateKey.generate())
        self._latest: dict[str, tuple[int, int, int]] = {}
        self._attempt: Attempt = Over()
        self._answers: dict[str, bytes] = {}

    def take_roster(self, roster: Roster) -> None:
        """Hold what others sign against ``roster`` from here on."""
        self._roster = roster

    def announce(self, job: str) -> bytes:
        """The signed key under which others encrypt shares to this site in ``job``; only recovery needs one."""
        if self._share_key[0] != job:
            self._share_key = (job, X25519PrivateKey.generate())
        public = public_bytes(self._share_key[1]).hex()
        return seal(ShareKey(job=job, site=self._site, public_key=public), self._key)

    def commit(self, proposal: SumProposal, *, task: SumTask, floor: SumFloor) -> bytes:
        """Rule 1: the signed commitment to the proposed terms, if they are those of ``task`` and above ``floor``.

        A later attempt ends the one before it.

        Raises:
            PolicyViolated: too few participants, or too few to bring the noise that the plan counts on.
            MessageRefused: other terms than the sealed job's, or keys that do not fit.
            AttemptOver: this or a later attempt was begun before, or this site's share key was lost in a restart.
            SignatureRefused: a participant is not on this site's roster, or a share key is not its site's.
        """
        terms = proposal.terms
        self._require_task(terms, task)
        self._require_company(terms, floor)
        if (kept := self._answers.get(_request_digest(proposal))) is not None:
            return kept
        self._require_share_keys(proposal)
        latest = self._latest.get(task.job)
        if latest is not None and task.place <= latest:
            raise AttemptOver(
                f"secure sum: {task.purpose} round {task.round_index} attempt {task.attempt} was begun before, or "
                "something later was; ask for a further attempt"
            )
        committed = self._committed(terms)
        self.forget()
        self._latest[task.job] = task.place
        self._attempt = committed
        self._answers[_request_digest(proposal)] = committed.envelope
        return committed.envelope

    @property
    def task(self) -> SumTask | None:
        """What the attempt is about in which no vector is masked yet; nothing once one is, or the attempt is over."""
        match self._attempt:
            case Committed():
                return self._attempt.terms.task
            case Confirmed():
                return self._attempt.agreed.terms.task
            case _:
                return None

    def confirm(self, commitments: SumCommitments) -> Agreed:
        """Rule 2: true afterwards that every participant signed the same terms. Only then is it time to charge.

        The same again is agreed to again: a charge that could not be written may be tried once more.

        Returns:
            What everybody agreed on.

        Raises:
            SignatureRefused: a commitment is not by the identity on this site's own roster.
            MessageRefused: a commitment is missing or to other terms.
            AttemptOver: out of order, or shares that were sent to this site do not open.
        """
        if isinstance(self._attempt, Confirmed) and commitments == self._attempt.commitments:
            return self._attempt.agreed
        state = self._expect(Committed)
        if commitments.terms_digest != state.terms.digest:
            raise MessageRefused("commitments: to other terms than this site signed")
        envelopes = {site: envelope.encode() for site, envelope in commitments.envelopes.items()}
        agreed = open_commitments(envelopes, terms=state.terms, roster=self._roster)
        if envelopes[self._site] != state.envelope:
            raise MessageRefused(f"commitments: the one of {self._site} is not what this site signed")
        held = self._opened_shares(state, agreed)
        # Every key was tried in open_commitments: nothing can fail between here and the next state.
        masks = self._masks(state, agreed)
        self._attempt = Confirmed(agreed=agreed, commitments=commitments, masks=masks, held=held)
        return agreed

    def mask(self, vector: IntArray) -> MaskedUpload:
        """Rule 3: ``vector`` [size] under masks, signed for; once. Seeds are wiped.

        Raises:
            ModelRefused: not ``size`` 64-bit integers, or one beyond ``entry_limit``.
            AttemptOver: out of order.
        """
        state = self._expect(Confirmed)
        task = state.agreed.terms.task
        if vector.shape != (task.size,) or vector.dtype != np.int64:
            raise ModelRefused(f"vector of {vector.dtype} {vector.shape}: {task.size} 64-bit integers expected")
        # Both ends as they are: the absolute value of the least int64 is negative.
        if int(vector.max()) > task.entry_limit or int(vector.min()) < -task.entry_limit:
            raise ModelRefused(f"vector: a number exceeds entry_limit {task.entry_limit} in size; the sum could wrap")
        # Before anything can fail: whatever happens from here on, no second vector goes under these masks.
        self._attempt = Masked(agreed=state.agreed, held=state.held) if state.held else Over()
        try:
            masked = apply_masks(vector, state.masks)
        finally:
            for mask in state.masks:
                mask.wipe()
        document = MaskedVector(
            transcript=state.agreed.transcript, site=self._site, vector_digest=vector_digest(masked)
        )
        return MaskedUpload(document=seal(document, self._key), vector=masked)

    def vote(self, request: SumSurvivors) -> bytes:
        """Rule 4: the signed vote for this set of survivors; for one set only.

        Raises:
            MessageRefused: for another attempt, without this site, or too few.
            AttemptOver: out of order.
        """
        if (kept := self._answers.get(_request_digest(request))) is not None:
            return kept
        state = self._expect(Masked)
        self._require_transcript(request.transcript, state.agreed)
        require_survivors(request.survivors, terms=state.agreed.terms)
        if self._site not in request.survivors:
            raise MessageRefused(f"survivors: without {self._site}, which is alive")
        vote = SurvivorVote(transcript=request.transcript, site=self._site, survivors=request.survivors)
        self._attempt = Voted(agreed=state.agreed, held=state.held, survivors=request.survivors)
        return self._answer(request, vote)

    def reveal(self, request: SumVotes) -> bytes:
        """Rule 5: one share of each participant, once every survivor has signed the set that this site signed.

        Raises:
            SignatureRefused: a vote is not by the identity on this site's own roster.
            MessageRefused: a vote is missing, or for another set.
            AttemptOver: out of order.
        """
        if (kept := self._answers.get(_request_digest(request))) is not None:
            return kept
        state = self._expect(Voted)
        self._require_transcript(request.transcript, state.agreed)
        if set(request.envelopes) != set(state.survivors):
            raise MessageRefused("votes: not of exactly the survivors that this site voted for")
        for site, envelope in request.envelopes.items():
            open_vote(envelope.encode(), agreed=state.agreed, survivors=state.survivors, site=site, roster=self._roster)
        revealed = RevealedShares(
            transcript=request.transcript,
            site=self._site,
            seed_shares={site: bytes(state.held[site].seed) for site in state.survivors},
            key_shares={site: bytes(held.key) for site, held in state.held.items() if site not in state.survivors},
        )
        self._attempt = Over()
        state.wipe()
        return self._answer(request, revealed)

    def forget(self) -> None:
        """Give the current attempt up; its secrets are overwritten, and nothing of it can be asked any more."""
        self._attempt.wipe()
        self._attempt = Over()
        self._answers = {}

    def _require_task(self, terms: SumTerms, task: SumTask) -> None:
        if terms.task != task:
            changed = [name for name in vars(task) if getattr(terms.task, name) != getattr(task, name)]
            raise MessageRefused(f"secure sum: the proposed {changed[0]} is not the one that follows from the job")

    def _require_company(self, terms: SumTerms, floor: SumFloor) -> None:
        if self._site not in terms.participants:
            raise MessageRefused(f"secure sum: {self._site} is not among the participants")
        for site in terms.participants:
            self._roster.key_of(site)
        # Those who may vanish do not count: a coordinator can say so of anyone whose vector it keeps back.
        if terms.threshold < floor.minimum_participants:
            raise PolicyViolated(
                f"secure sum: {terms.threshold} participants are sure to be in the total; this site's policy asks for "
                f"{floor.minimum_participants}"
            )
        if terms.threshold < floor.noise_shares:
            raise PolicyViolated(
                f"secure sum: {terms.threshold} sites are sure to add noise; the plan counts on {floor.noise_shares}"
            )

    def _require_share_keys(self, proposal: SumProposal) -> None:
        terms = proposal.terms
        if set(proposal.share_key_envelopes) != set(terms.share_keys):
            raise MessageRefused("secure sum: share keys and their signatures are not of the same sites")
        for site, envelope in proposal.share_key_envelopes.items():
            announced = open_share_key(envelope.encode(), job=terms.task.job, site=site, roster=self._roster)
            if announced.public_key != terms.share_keys[site]:
                raise MessageRefused(f"share key of {site}: is not the one in the terms")
        own = public_bytes(self._share_key[1]).hex()
        if terms.share_keys and terms.share_keys[self._site] != own:
            raise AttemptOver(f"share key of {self._site}: was lost in a restart; ask this site to announce another")

    def _committed(self, terms: SumTerms) -> Committed:
        key, seed = X25519PrivateKey.generate(), bytearray()
        sealed: dict[SiteId, bytes] = {}
        own: dict[SiteId, Held] = {}
        if terms.task.tolerated_dropouts:
            seed = bytearray(secrets.token_bytes(SEED_BYTES))
            sealed, own = self._dealt(terms, key, seed)
        commitment = SumCommitment(
            terms_digest=terms.digest,
            site=self._site,
            public_key=public_bytes(key).hex(),
            seed_digest=hashlib.sha256(seed).hexdigest() if seed else "",
            shares=sealed,
        )
        return Committed(terms=terms, envelope=seal(commitment, self._key), key=key, seed=seed, own=own)

    def _dealt(
        self, terms: SumTerms, key: X25519PrivateKey, seed: bytearray
    ) -> tuple[dict[SiteId, bytes], dict[SiteId, Held]]:
        """Shares of both secrets: encrypted for everybody else, and as they are for this site."""
        number, threshold = len(terms.participants), terms.threshold
        key_shares = split(key.private_bytes_raw(), shares=number, threshold=threshold)
        seed_shares = split(seed, shares=number, threshold=threshold)
        sealed, own = {}, {}
        for site, key_share, seed_share in zip(terms.participants, key_shares, seed_shares, strict=True):
            if site == self._site:
                own[site] = Held(key=bytearray(key_share), seed=bytearray(seed_share))
                continue
            cipher = share_cipher(
                self._share_key[1],
                bytes.fromhex(terms.share_keys[site]),
                dealer=self._site,
                recipient=site,
                terms_digest=terms.digest,
            )
            sealed[site] = seal_shares(cipher, key_share=key_share, seed_share=seed_share)
        return sealed, own

    def _opened_shares(self, state: Committed, agreed: Agreed) -> dict[SiteId, Held]:
        held = dict(state.own)
        for dealer, key in state.terms.share_keys.items():
            if dealer != self._site:
                cipher = share_cipher(
                    self._share_key[1],
                    bytes.fromhex(key),
                    dealer=dealer,
                    recipient=self._site,
                    terms_digest=state.terms.digest,
                )
                try:
                    opened = open_shares(cipher, agreed.commitments[dealer].shares[self._site], dealer=dealer)
                except MessageRefused as error:
                    for other in held.keys() - state.own.keys():
                        held[other].wipe()
                    # Nobody but the two can tell who spoilt them: not this site's fault, nor the coordinator's.
                    raise AttemptOver(f"{error}; begin a further attempt") from error
                held[dealer] = Held(key=opened[0], seed=opened[1])
        return held

    def _masks(self, state: Committed, agreed: Agreed) -> tuple[Mask, ...]:
        parties = {
            site: Party(site=site, public_key=bytes.fromhex(commitment.public_key))
            for site, commitment in agreed.commitments.items()
        }
        pairs = tuple(
            pair_mask(state.key, own=parties[self._site], other=party, transcript=agreed.transcript)
            for site, party in parties.items()
            if site != self._site
        )
        return (*pairs, Mask(seed=state.seed, negative=False)) if state.seed else pairs

    def _require_transcript(self, transcript: str, agreed: Agreed) -> None:
        if transcript != agreed.transcript:
            raise MessageRefused("secure sum: this is about another attempt than the one that this site is in")

    def _expect(self, wanted: type[State]) -> State:
        if not isinstance(self._attempt, wanted):
            raise AttemptOver(
                f"secure sum: out of order; this site's attempt is {type(self._attempt).__name__.lower()}, and "
                f"{wanted.__name__.lower()} is expected; begin a further attempt"
            )
        return self._attempt

    def _answer(self, request: SumSurvivors | SumVotes, reply: SurvivorVote | RevealedShares) -> bytes:
        envelope = seal(reply, self._key)
        self._answers[_request_digest(request)] = envelope
        return envelope


def _request_digest(request: SumProposal | SumSurvivors | SumVotes) -> str:
    return digest(encode(request))
