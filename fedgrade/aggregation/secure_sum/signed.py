"""What other sites signed, each checked against one's own roster, and against the attempt it is for.

Sites and coordinator read one another through this file. Nobody takes anyone's word for who signed. What one site
would refuse, the coordinator refuses too, sizes included: else one partner could have all others refuse its relay.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedgrade.aggregation.secure_sum.documents import (
    MAX_VOUCHER_BYTES,
    MaskedVector,
    RevealedShares,
    ShareKey,
    SumCommitment,
    SumTerms,
    SurvivorVote,
    transcript_of,
)
from fedgrade.aggregation.secure_sum.masks import require_usable
from fedgrade.errors import MessageRefused
from fedgrade.trust.envelope import open_sealed
from fedgrade.trust.identity import Roster, SiteId


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """An attempt to which every participant is committed: their commitments, and the transcript over them."""

    terms: SumTerms
    commitments: Mapping[SiteId, SumCommitment]
    transcript: str


def open_share_key(raw: bytes, *, job: str, site: SiteId, roster: Roster) -> ShareKey:
    """The key that ``site`` announced for ``job``.

    Raises:
        SignatureRefused: not signed by that site, or the roster does not know it.
        MessageRefused: for another job, in the name of another site, or no secret can be shared with it.
    """
    announced = open_sealed(raw, as_=ShareKey, signed_by=roster.key_of(site), limit=MAX_VOUCHER_BYTES)
    _require_author(announced.site, site, what="share key")
    if announced.job != job:
        raise MessageRefused(f"share key of {site}: for job {announced.job[:16]!r}, not {job[:16]!r}")
    require_usable(bytes.fromhex(announced.public_key), of=f"share key of {site}")
    return announced


def open_commitment(raw: bytes, *, terms: SumTerms, site: SiteId, roster: Roster) -> SumCommitment:
    """What ``site`` committed itself to; complete for ``terms``.

    Raises:
        SignatureRefused: not signed by that site, or the roster does not know it.
        MessageRefused: to other terms, in the name of another site, with other shares than the terms ask for, or with a
            key that no secret can be shared with.
    """
    commitment = open_sealed(raw, as_=SumCommitment, signed_by=roster.key_of(site), limit=terms.document_limit)
    _require_author(commitment.site, site, what="commitment")
    if commitment.terms_digest != terms.digest:
        raise MessageRefused(f"commitment of {site}: to other terms; it is stale, or that site was shown another set")
    recipients = set(terms.participants) - {site} if terms.task.tolerated_dropouts else set()
    if set(commitment.shares) != recipients or bool(commitment.seed_digest) != bool(recipients):
        raise MessageRefused(
            f"commitment of {site}: has shares for {len(commitment.shares)} sites of {len(recipients)}"
        )
    require_usable(bytes.fromhex(commitment.public_key), of=f"commitment of {site}")
    return commitment


def open_commitments(envelopes: Mapping[SiteId, bytes], *, terms: SumTerms, roster: Roster) -> Agreed:
    """The attempt, once every participant has committed itself to ``terms``, each with a key of its own.

    Raises:
        SignatureRefused: some commitment is not signed by whom it should be.
        MessageRefused: one is missing or too many, to other terms, or two have one key.
    """
    if set(envelopes) != set(terms.participants):
        raise MessageRefused(
            f"commitments: of {len(envelopes)} sites for {len(terms.participants)} participants; they must be the same"
        )
    commitments = {
        site: open_commitment(envelopes[site], terms=terms, site=site, roster=roster) for site in terms.participants
    }
    if len({commitment.public_key for commitment in commitments.values()}) != len(commitments):
        raise MessageRefused("commitments: two sites have one key; each must make its own")
    return Agreed(terms=terms, commitments=commitments, transcript=transcript_of(terms, envelopes))


def open_masked_vector(raw: bytes, *, agreed: Agreed, site: SiteId, roster: Roster) -> MaskedVector:
    """What ``site`` says of its masked vector.

    Raises:
        SignatureRefused: not signed by that site.
        MessageRefused: of another attempt, or in the name of another site.
    """
    masked = open_sealed(raw, as_=MaskedVector, signed_by=roster.key_of(site), limit=MAX_VOUCHER_BYTES)
    _require_author(masked.site, site, what="masked vector")
    _require_transcript(masked.transcript, agreed, what=f"masked vector of {site}")
    return masked


def open_vote(
    raw: bytes, *, agreed: Agreed, survivors: tuple[SiteId, ...], site: SiteId, roster: Roster
) -> SurvivorVote:
    """The vote of ``site`` for exactly these ``survivors``.

    Raises:
        SignatureRefused: not signed by that site.
        MessageRefused: for another set or attempt, or in the name of another site.
    """
    vote = open_sealed(raw, as_=SurvivorVote, signed_by=roster.key_of(site), limit=agreed.terms.document_limit)
    _require_author(vote.site, site, what="vote")
    _require_transcript(vote.transcript, agreed, what=f"vote of {site}")
    if vote.survivors != survivors:
        raise MessageRefused(f"vote of {site}: for another set of survivors; this attempt must be given up")
    return vote


def open_revealed(
    raw: bytes, *, agreed: Agreed, survivors: tuple[SiteId, ...], site: SiteId, roster: Roster
) -> RevealedShares:
    """The shares that ``site`` revealed: of seeds of all ``survivors``, of keys of all others.

    Raises:
        SignatureRefused: not signed by that site.
        MessageRefused: for another attempt or set, or in the name of another site.
    """
    limit = agreed.terms.document_limit
    revealed = open_sealed(raw, as_=RevealedShares, signed_by=roster.key_of(site), limit=limit)
    _require_author(revealed.site, site, what="shares")
    _require_transcript(revealed.transcript, agreed, what=f"shares of {site}")
    vanished = set(agreed.terms.participants) - set(survivors)
    if set(revealed.seed_shares) != set(survivors) or set(revealed.key_shares) != vanished:
        raise MessageRefused(f"shares of {site}: not one of each survivor's seed and each vanished site's key")
    return revealed


def require_survivors(survivors: tuple[SiteId, ...], *, terms: SumTerms) -> None:
    """Return if ``survivors`` may be what is left of the participants.

    Raises:
        MessageRefused: not sorted, strangers among them, or fewer than the terms need.
    """
    if list(survivors) != sorted(set(survivors)) or not set(survivors) <= set(terms.participants):
        raise MessageRefused("survivors: must be participants, sorted, each once")
    if len(survivors) < terms.threshold:
        raise MessageRefused(
            f"survivors: {len(survivors)} of {len(terms.participants)}; the terms need {terms.threshold}, begin a "
            "further attempt"
        )


def _require_author(named: SiteId, site: SiteId, *, what: str) -> None:
    if named != site:
        raise MessageRefused(f"{what} of {site}: is in the name of {named[:80]!r}")


def _require_transcript(transcript: str, agreed: Agreed, *, what: str) -> None:
    if transcript != agreed.transcript:
        raise MessageRefused(f"{what}: is of another attempt, or of one in which that site was shown something else")
