"""Seeds that two sites agree on, and the streams of 64-bit words that they add and take away.

X25519 (RFC 7748), HKDF-SHA-256 (RFC 5869), AES-256-CTR (NIST SP 800-38A), all from ``cryptography``.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedgrade.aggregation.secure_sum.documents import PROTOCOL
from fedgrade.errors import MessageRefused
from fedgrade.trust.identity import SiteId

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]

SEED_BYTES = 32
# Words worked on at once: stream, mask and accumulator stay within a core's second-level cache.
_BLOCK = 2**14
_ZEROS = bytes(8 * _BLOCK)
# Nobody's secret: it only tries keys out.
_ANYBODY = X25519PrivateKey.from_private_bytes(bytes(32))
_SPARE = 16  # cryptography wants room for a whole cipher block behind its output


@dataclass(frozen=True, kw_only=True)
class Party:
    """One of two sites that agree on a seed: its name and its public X25519 key [32 bytes]."""

    site: SiteId
    public_key: bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """The stream of a seed, to be added or, if ``negative``, taken away. Prints nothing of the seed."""

    seed: bytearray
    negative: bool

    def __repr__(self) -> str:
        return "Mask(<secret>)"

    def wipe(self) -> None:
        """Overwrite the seed with zeros."""
        wipe(self.seed)


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The 32 bytes of ``key``'s public half."""
    return key.public_key().public_bytes_raw()


def agree(own: X25519PrivateKey, other: bytes, *, salt: bytes, info: bytes) -> bytearray:
    """The seed [32 bytes] that the holder of ``own`` shares with the holder of the public key ``other``.

    Raises:
        MessageRefused: ``other`` is a point of low order, with which no secret can be shared (RFC 7748, section 6.1).
    """
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise MessageRefused(f"X25519 key {other.hex()[:16]}…: no secret can be shared with it") from error
    return bytearray(HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=salt, info=info).derive(secret))


def require_usable(public_key: bytes, *, of: str) -> None:
    """Return if some secret can be shared with ``public_key``; a point of low order fails with every partner alike.

    Raises:
        MessageRefused: none can; names what it is the key ``of``.
    """
    try:
        _ANYBODY.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError as error:
        raise MessageRefused(f"{of}: X25519 key {public_key.hex()[:16]}…: no secret can be shared with it") from error


def pair_mask(own_key: X25519PrivateKey, *, own: Party, other: Party, transcript: str) -> Mask:
    """What ``own`` adds against ``other``; ``other`` has its opposite, and both are bound to ``transcript``.

    Raises:
        MessageRefused: the other's key is unusable.
    """
    lower, upper = sorted((own, other), key=lambda party: party.site)
    info = context("pair mask", lower.site.encode(), upper.site.encode(), lower.public_key + upper.public_key)
    seed = agree(own_key, other.public_key, salt=bytes.fromhex(transcript), info=info)
    return Mask(seed=seed, negative=own is upper)


def context(label: str, *parts: bytes) -> bytes:
    """HKDF's ``info``: protocol and label, then parts after a zero byte each; names hold no such byte."""
    return b"\0".join([f"{PROTOCOL} {label}".encode(), *parts])


def apply_masks(vector: IntArray, masks: Sequence[Mask]) -> IntArray:
    """``vector`` [size] plus every mask, modulo 2^64, read as signed numbers. The vector itself stays as it was.

    Raises:
        MessageRefused: a mask was wiped, and would hide nothing.
    """
    if not all(any(mask.seed) for mask in masks):
        raise MessageRefused("masks: one was used and wiped; it cannot hide a second vector")
    words: WordArray = vector.astype(np.uint64)
    streams = [(Cipher(algorithms.AES(mask.seed), modes.CTR(bytes(16))).encryptor(), mask) for mask in masks]
    buffer = bytearray(8 * _BLOCK + _SPARE)
    stream: WordArray = np.frombuffer(buffer, dtype="<u8", count=_BLOCK)
    # Block by block, all masks in turn: the words stay in cache, and memory does not grow with the number of sites.
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK]
        zeros = memoryview(_ZEROS)[: 8 * block.size]
        for cipher, mask in streams:
            cipher.update_into(zeros, buffer)
            if mask.negative:
                block -= stream[: block.size]
            else:
                block += stream[: block.size]
    wipe(buffer)
    return words.view(np.int64)


def vector_digest(vector: IntArray) -> str:
    """SHA-256 of ``vector`` as little-endian 64-bit words, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<i8").data).hexdigest()


def wipe(secret: bytearray) -> None:
    """Overwrite ``secret`` with zeros, in place."""
    secret[:] = bytes(len(secret))
