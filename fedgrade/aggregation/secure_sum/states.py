"""Where a site can stand in an attempt, and which secrets it holds there. Each state knows how to lose them."""

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedgrade.aggregation.secure_sum.documents import SumCommitments, SumTerms
from fedgrade.aggregation.secure_sum.masks import Mask, wipe
from fedgrade.aggregation.secure_sum.signed import Agreed
from fedgrade.trust.identity import SiteId


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Held:
    """One site's two shares, as another holds them: of its attempt key, and of its self-mask seed."""

    key: bytearray
    seed: bytearray

    def wipe(self) -> None:
        """Overwrite both with zeros."""
        wipe(self.key)
        wipe(self.seed)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Over:
    """No attempt, or one whose secrets are gone."""

    def wipe(self) -> None:
        """Nothing is left to wipe."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Committed:
    """The terms are signed; nothing is masked. ``own`` shares stay here, ``seed`` is empty, without recovery."""

    terms: SumTerms
    envelope: bytes
    key: X25519PrivateKey
    seed: bytearray
    own: Mapping[SiteId, Held]

    def wipe(self) -> None:
        """Overwrite seed and shares; the key is OpenSSL's, which clears it when this state is dropped."""
        wipe(self.seed)
        _wipe_all(self.own)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Confirmed:
    """Everybody signed the same terms, as ``commitments`` say; ``masks`` are ready."""

    agreed: Agreed
    commitments: SumCommitments
    masks: tuple[Mask, ...]
    held: Mapping[SiteId, Held]

    def wipe(self) -> None:
        """Overwrite every seed and share."""
        for mask in self.masks:
            mask.wipe()
        _wipe_all(self.held)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Masked:
    """The vector has left; shares are held in case some site's did not. Only with recovery."""

    agreed: Agreed
    held: Mapping[SiteId, Held]

    def wipe(self) -> None:
        """Overwrite every share."""
        _wipe_all(self.held)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Voted:
    """One set of survivors is signed; shares await everybody's vote for it."""

    agreed: Agreed
    held: Mapping[SiteId, Held]
    survivors: tuple[SiteId, ...]

    def wipe(self) -> None:
        """Overwrite every share."""
        _wipe_all(self.held)


Attempt = Over | Committed | Confirmed | Masked | Voted


def _wipe_all(held: Mapping[SiteId, Held]) -> None:
    for shares in held.values():
        shares.wipe()
