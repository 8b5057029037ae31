"""What is said during a secure sum. Field by field in docs/secure-sum.md; lengths depend on the terms alone.

Documents of sites are signed (DSSE) by the site's identity. Documents of the coordinator are unsigned here because
nothing rests on them; their ``kind`` lets a signed request carry them.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedgrade.errors import MessageRefused
from fedgrade.trust.canonical import digest, encode
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import Purpose

PROTOCOL = "fedgrade-secure-sum-1"
MAX_SIZE = 2**25  # numbers in a vector: 256 MiB, as much as one message holds
MAX_SITES = 1000
# Every site is shown every other site's shares; with more sites that would outgrow one document.
MAX_RECOVERY_SITES = 64
SHARE_BYTES = 33
# Nonce, key share, seed share, authentication tag.
SEALED_SHARES_BYTES = 12 + 2 * SHARE_BYTES + 16
# What a site signs once, and what it adds for each participant: no honest document comes near.
MAX_VOUCHER_BYTES = 1024
_BYTES_A_SITE = 512
_TOTAL_LIMIT = 2**63
_HEXADECIMAL = re.compile(r"[0-9a-f]{64}")
_PURPOSES: tuple[Purpose, ...] = ("centre", "train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class SumTask:
    """What one attempt adds up. Every site works it out from its own copy of the sealed job.

    ``size`` counts the numbers in each vector; none of them exceeds ``entry_limit`` in size. The total stands even if
    ``tolerated_dropouts`` sites vanish after they committed themselves; with 0 it is all or nothing.
    """

    job: str
    purpose: Purpose
    round_index: int
    attempt: int
    weights_digest: str
    plan_digest: str
    size: int
    entry_limit: int
    tolerated_dropouts: int

    def __post_init__(self) -> None:
        for name in ("job", "weights_digest", "plan_digest"):
            _require_hexadecimal(getattr(self, name), name=f"secure sum {name}")
        if self.round_index < 0 or self.attempt < 0:
            raise MessageRefused(f"secure sum: round {self.round_index}, attempt {self.attempt}; both count from 0")
        if not 1 <= self.size <= MAX_SIZE:
            raise MessageRefused(f"secure sum: size {self.size}; it must be in 1..{MAX_SIZE}")
        if self.entry_limit < 0:
            raise MessageRefused(f"secure sum: entry_limit {self.entry_limit}; it must be at least 0")

    @property
    def place(self) -> tuple[int, int, int]:
        """Where in its job this is: attempts are ordered as a job goes."""
        return _PURPOSES.index(self.purpose), self.round_index, self.attempt


@dataclass(frozen=True, kw_only=True)
class SumTerms:
    """Everything that every site of an attempt signs before a vector leaves.

    Guarantee: the total of vectors within ``task.entry_limit`` stays below 2^63 in size, so that nothing wraps.
    """

    protocol: Literal["fedgrade-secure-sum-1"] = "fedgrade-secure-sum-1"
    task: SumTask
    participants: tuple[SiteId, ...]
    share_keys: dict[SiteId, str]

    def __post_init__(self) -> None:
        sites, dropouts = len(self.participants), self.task.tolerated_dropouts
        if list(self.participants) != sorted(set(self.participants)):
            raise MessageRefused("secure sum: participants must be sorted, each once")
        if not 2 <= sites <= MAX_SITES:  # noqa: PLR2004 - with one there is no sum
            raise MessageRefused(f"secure sum: {sites} participants; it takes 2 to {MAX_SITES}")
        if sites * self.task.entry_limit >= _TOTAL_LIMIT:
            raise MessageRefused(
                f"secure sum: {sites} participants with entry_limit {self.task.entry_limit}; their product must stay "
                "below 2^63, or the total could wrap"
            )
        if not 0 <= 3 * dropouts < sites or (dropouts and sites > MAX_RECOVERY_SITES):
            raise MessageRefused(
                f"secure sum: tolerated_dropouts {dropouts} of {sites} participants; it must be at least 0, three "
                f"times it below the participants, and those at most {MAX_RECOVERY_SITES} if it is above 0"
            )
        if set(self.share_keys) != (set(self.participants) if dropouts else set()):
            raise MessageRefused("secure sum: share_keys belong to every participant if dropouts are tolerated")
        for key in self.share_keys.values():
            _require_hexadecimal(key, name="secure sum share key")

    @property
    def digest(self) -> str:
        """What commitments sign the terms by."""
        return digest(encode(self))

    @property
    def document_limit(self) -> int:
        """No site's signed document is longer than these bytes, so that everybody's fit into one message."""
        return MAX_VOUCHER_BYTES + (_BYTES_A_SITE * len(self.participants) if self.task.tolerated_dropouts else 0)

    @property
    def threshold(self) -> int:
        """How many sites must last to the end: all, less those that may vanish."""
        return len(self.participants) - self.task.tolerated_dropouts

    def number(self, site: SiteId) -> int:
        """Where Shamir's polynomials are evaluated for ``site``: its place among participants, from 1."""
        return 1 + self.participants.index(site)


@dataclass(frozen=True, kw_only=True)
class ShareKey:
    """A site's X25519 key for this job, under which others encrypt shares to it."""

    protocol: Literal["fedgrade-secure-sum-1"] = "fedgrade-secure-sum-1"
    job: str
    site: SiteId
    public_key: str

    def __post_init__(self) -> None:
        _require_hexadecimal(self.public_key, name="share key")


@dataclass(frozen=True, kw_only=True)
class SumProposal:
    """From the coordinator: take part on these terms. ``share_key_envelopes`` prove the share keys in the terms."""

    kind: Literal["sum_proposal"] = "sum_proposal"
    terms: SumTerms
    share_key_envelopes: dict[SiteId, str]


@dataclass(frozen=True, kw_only=True)
class SumCommitment:
    """A site takes part on these terms and no others, with a fresh X25519 key.

    ``seed_digest`` and ``shares`` (recipient to ciphertext) are empty unless dropouts are tolerated.
    """

    terms_digest: str
    site: SiteId
    public_key: str
    seed_digest: str
    shares: dict[SiteId, bytes]

    def __post_init__(self) -> None:
        _require_hexadecimal(self.public_key, name=f"attempt key of {self.site[:80]!r}")
        if self.seed_digest:
            _require_hexadecimal(self.seed_digest, name=f"seed digest of {self.site[:80]!r}")
        if any(len(share) != SEALED_SHARES_BYTES for share in self.shares.values()):
            raise MessageRefused(f"commitment of {self.site[:80]!r}: each share takes {SEALED_SHARES_BYTES} bytes")


@dataclass(frozen=True, kw_only=True)
class SumCommitments:
    """From the coordinator: everybody's commitments, as they were signed."""

    kind: Literal["sum_commitments"] = "sum_commitments"
    terms_digest: str
    envelopes: dict[SiteId, str]


@dataclass(frozen=True, kw_only=True)
class MaskedVector:
    """A site vouches for the masked vector that travels beside this document, as little-endian 64-bit words."""

    transcript: str
    site: SiteId
    vector_digest: str


@dataclass(frozen=True, kw_only=True)
class SumSurvivors:
    """From the coordinator: whose vectors arrived. Everybody else has vanished."""

    kind: Literal["sum_survivors"] = "sum_survivors"
    transcript: str
    survivors: tuple[SiteId, ...]


@dataclass(frozen=True, kw_only=True)
class SurvivorVote:
    """A survivor signs this set of survivors, and no other in this attempt."""

    transcript: str
    site: SiteId
    survivors: tuple[SiteId, ...]


@dataclass(frozen=True, kw_only=True)
class SumVotes:
    """From the coordinator: every survivor's vote, as it was signed."""

    kind: Literal["sum_votes"] = "sum_votes"
    transcript: str
    envelopes: dict[SiteId, str]


@dataclass(frozen=True, kw_only=True)
class RevealedShares:
    """One share a site, never two: of the self-mask seed of each survivor, of the key of each that vanished."""

    transcript: str
    site: SiteId
    seed_shares: dict[SiteId, bytes]
    key_shares: dict[SiteId, bytes]

    def __post_init__(self) -> None:
        if any(len(share) != SHARE_BYTES for share in (*self.seed_shares.values(), *self.key_shares.values())):
            raise MessageRefused(f"shares of {self.site[:80]!r}: each takes {SHARE_BYTES} bytes")


def transcript_of(terms: SumTerms, envelopes: Mapping[SiteId, bytes]) -> str:
    """What both phases hang on: the digest of the terms and of each commitment's exact bytes, in order."""
    running = hashlib.sha256(bytes.fromhex(terms.digest))
    for site in terms.participants:
        running.update(hashlib.sha256(envelopes[site]).digest())
    return running.hexdigest()


def _require_hexadecimal(text: str, *, name: str) -> None:
    if not _HEXADECIMAL.fullmatch(text):
        raise MessageRefused(f"{name} {text[:80]!r}: 64 lower-case hexadecimal digits expected")
