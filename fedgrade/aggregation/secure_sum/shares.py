"""Shamir's secret sharing, and shares encrypted from site to site.

Shamir (1979), doi 10.1145/359168.359176, over the prime 2^256 + 297: whoever holds fewer shares than the threshold
knows nothing of the secret. The arithmetic is Python's, which does not take constant time: it must only ever see
secrets that are fresh for one attempt.
"""

import secrets
from collections.abc import Collection, Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedgrade.aggregation.secure_sum.documents import SHARE_BYTES
from fedgrade.aggregation.secure_sum.masks import SEED_BYTES, agree, context, wipe
from fedgrade.errors import MessageRefused
from fedgrade.trust.identity import SiteId

PRIME = 2**256 + 297
_NONCE_BYTES = 12


def split(secret: bytes | bytearray, *, shares: int, threshold: int) -> tuple[bytes, ...]:
    """``secret`` [32 bytes] as ``shares`` shares [33 bytes each], of which any ``threshold`` give it back.

    Share number m, counted from 1, is the value at m of a polynomial of degree ``threshold`` - 1 whose value at 0 is
    the secret and whose other coefficients come from the operating system.
    """
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return tuple(_value(coefficients, at=number).to_bytes(SHARE_BYTES) for number in range(1, shares + 1))


def join(shares: Mapping[int, bytes]) -> bytearray:
    """The secret [32 bytes] behind exactly as many ``shares``, by number, as it takes.

    Raises:
        MessageRefused: some share is not one, or the value at 0 is no 32 bytes long: a share was altered.
    """
    values = {number: int.from_bytes(share) for number, share in shares.items()}
    if any(value >= PRIME for value in values.values()):
        raise MessageRefused("shares: a value is beyond the prime field; no honest site sends that")
    secret = sum(value * _weight(number, values.keys()) for number, value in values.items()) % PRIME
    if secret >= 2 ** (8 * SEED_BYTES):
        raise MessageRefused("shares: they do not belong to one secret")
    return bytearray(secret.to_bytes(SEED_BYTES))


def share_cipher(
    own: X25519PrivateKey, other: bytes, *, dealer: SiteId, recipient: SiteId, terms_digest: str
) -> AESGCM:
    """The cipher for what ``dealer`` deals to ``recipient`` in one attempt; both can derive it, in this direction.

    Raises:
        MessageRefused: the other's key is unusable.
    """
    info = context("share", dealer.encode(), recipient.encode())
    key = agree(own, other, salt=bytes.fromhex(terms_digest), info=info)
    cipher = AESGCM(key)
    wipe(key)
    return cipher


def seal_shares(cipher: AESGCM, *, key_share: bytes, seed_share: bytes) -> bytes:
    """Both shares for one recipient, encrypted: nonce, ciphertext, tag; of one length always."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, key_share + seed_share, None)


def open_shares(cipher: AESGCM, sealed: bytes, *, dealer: SiteId) -> tuple[bytearray, bytearray]:
    """The key share and the seed share in ``sealed``.

    Raises:
        MessageRefused: they were not encrypted to this site for this attempt, or were altered.
    """
    try:
        plain = cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
    except InvalidTag as error:
        raise MessageRefused(f"shares from {dealer}: do not open; begin a further attempt without that site") from error
    return bytearray(plain[:SHARE_BYTES]), bytearray(plain[SHARE_BYTES:])


def _value(coefficients: list[int], *, at: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * at + coefficient) % PRIME
    return value


def _weight(number: int, numbers: Collection[int]) -> int:
    """Lagrange's weight at 0 of the share ``number`` among ``numbers``."""
    above = below = 1
    for other in numbers:
        if other != number:
            above, below = above * other % PRIME, below * (other - number) % PRIME
    return above * pow(below, -1, PRIME)
