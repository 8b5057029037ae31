"""Every derivation, frozen, and made a second time from its parts."""

import hashlib
import hmac
import json
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrade.aggregation.secure_sum.documents import (
    MaskedVector,
    RevealedShares,
    ShareKey,
    SumCommitment,
    SumTerms,
    SurvivorVote,
    transcript_of,
)
from fedgrade.aggregation.secure_sum.masks import (
    Mask,
    Party,
    agree,
    apply_masks,
    pair_mask,
    public_bytes,
    vector_digest,
)
from fedgrade.aggregation.secure_sum.shares import PRIME, join, open_shares, share_cipher
from fedgrade.trust.canonical import encode
from fedgrade.trust.envelope import payload_type
from tests.aggregation.secure_sum.partnership import TASK, names

FIRST, SECOND, THIRD = names(3)
KEYS = {
    site: X25519PrivateKey.from_private_bytes(bytes(range(start, start + 32)))
    for site, start in ((FIRST, 0), (SECOND, 32), (THIRD, 64))
}
PARTIES = {site: Party(site=site, public_key=public_bytes(key)) for site, key in KEYS.items()}
SALT = "5a" * 32
FIELD = 2**255 - 19


def ladder(private, public):
    """X25519 as RFC 7748, section 5, writes it down."""
    scalar = int.from_bytes(private, "little") & ~7 & (2**255 - 1) | 2**254
    u = int.from_bytes(public, "little") & (2**255 - 1)
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for bit in ((scalar >> position) & 1 for position in reversed(range(255))):
        if bit != swap:
            x2, z2, x3, z3, swap = x3, z3, x2, z2, bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        x3, z3 = (d * a + c * b) ** 2 % FIELD, u * (d * a - c * b) ** 2 % FIELD
        x2, z2 = a**2 * b**2 % FIELD, (a**2 - b**2) * (a**2 + 121665 * (a**2 - b**2)) % FIELD
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, -1, FIELD) % FIELD).to_bytes(32, "little")


def hkdf(secret, *, salt, info):
    """One block of HKDF-SHA-256 as RFC 5869 writes it down."""
    extracted = hmac.digest(salt, secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def counter_mode(seed, words):
    """AES-256 of 0, 1, 2, … one block at a time, as 64-bit little-endian words."""
    cipher = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()  # noqa: S305 - counter mode, by its definition
    blocks = b"".join(cipher.update(counter.to_bytes(16)) for counter in range(words // 2 + 1))
    return [int.from_bytes(blocks[8 * index : 8 * index + 8], "little") for index in range(words)]


def mask_of(own, other):
    return pair_mask(KEYS[own], own=PARTIES[own], other=PARTIES[other], transcript=SALT)


def test_a_pair_seed_is_hkdf_of_x25519_over_names_and_keys():
    info = (
        b"fedgrade-secure-sum-1 pair mask\0site-00\0site-01\0" + PARTIES[FIRST].public_key + PARTIES[SECOND].public_key
    )
    secret = ladder(bytes(range(32)), PARTIES[SECOND].public_key)
    expected = hkdf(secret, salt=bytes.fromhex(SALT), info=info)
    lower, upper = mask_of(FIRST, SECOND), mask_of(SECOND, FIRST)
    assert bytes(lower.seed) == bytes(upper.seed) == expected
    assert (lower.negative, upper.negative) == (False, True)


def test_a_pair_seed_changes_with_the_pair_the_keys_and_the_transcript():
    same_keys = pair_mask(
        KEYS[FIRST], own=PARTIES[FIRST], other=Party(site=THIRD, public_key=PARTIES[SECOND].public_key), transcript=SALT
    )
    other_attempt = pair_mask(KEYS[FIRST], own=PARTIES[FIRST], other=PARTIES[SECOND], transcript="a5" * 32)
    seeds = [mask_of(FIRST, SECOND), mask_of(FIRST, THIRD), mask_of(SECOND, THIRD), same_keys, other_attempt]
    assert len({bytes(mask.seed) for mask in seeds}) == 5


@settings(max_examples=25)
@given(st.binary(min_size=32, max_size=32).filter(any), st.integers(1, 50), st.booleans())
def test_a_mask_is_aes_in_counter_mode_added_modulo_two_to_the_64(seed, size, negative):
    vector = np.arange(size, dtype=np.int64) - size // 2
    masked = apply_masks(vector, [Mask(seed=bytearray(seed), negative=negative)])
    sign = -1 if negative else 1
    expected = [(int(v) + sign * m) % 2**64 for v, m in zip(vector, counter_mode(seed, size), strict=True)]
    assert masked.view(np.uint64).tolist() == expected
    assert vector.tolist() == list(range(-(size // 2), size - size // 2))


def test_a_share_cipher_is_hkdf_of_x25519_over_dealer_and_recipient():
    cipher = share_cipher(KEYS[SECOND], PARTIES[FIRST].public_key, dealer=FIRST, recipient=SECOND, terms_digest=SALT)
    info = b"fedgrade-secure-sum-1 share\0site-00\0site-01"
    secret = ladder(bytes(range(32)), PARTIES[SECOND].public_key)
    again = AESGCM(hkdf(secret, salt=bytes.fromhex(SALT), info=info))
    sealed = bytes(12) + again.encrypt(bytes(12), bytes(range(66)), None)
    assert open_shares(cipher, sealed, dealer=FIRST) == (bytes(range(33)), bytes(range(33, 66)))


def test_the_transcript_hashes_the_terms_and_every_envelope():
    terms = SumTerms(task=TASK, participants=names(3), share_keys={})
    envelopes = {site: site.encode() * 2 for site in reversed(names(3))}
    expected = hashlib.sha256(hashlib.sha256(encode(terms)).digest())
    for site in names(3):
        expected.update(hashlib.sha256(envelopes[site]).digest())
    assert transcript_of(terms, envelopes) == expected.hexdigest()


def test_derivations_are_those_that_were_published(frozen):
    recovery = SumTerms(
        task=replace(TASK, tolerated_dropouts=1),
        participants=names(4),
        share_keys={site: f"{number:02x}" * 32 for number, site in enumerate(names(4))},
    )
    plain = SumTerms(task=TASK, participants=names(3), share_keys={})
    vector = np.array([0, 1, -1, 2**62, -(2**62)], dtype=np.int64)
    masks = [mask_of(SECOND, FIRST), mask_of(SECOND, THIRD)]
    found = {
        "terms": encode(plain).decode(),
        "terms digest": plain.digest,
        "recovery terms": encode(recovery).decode(),
        "recovery terms digest": recovery.digest,
        "transcript": transcript_of(plain, {site: site.encode() for site in names(3)}),
        "public keys": {site: party.public_key.hex() for site, party in PARTIES.items()},
        "pair seeds": {
            f"{a} {b}": mask_of(a, b).seed.hex() for a, b in ((FIRST, SECOND), (FIRST, THIRD), (SECOND, THIRD))
        },
        "masked": apply_masks(vector, masks).view(np.uint64).tolist(),
        "masked digest": vector_digest(apply_masks(vector, masks)),
        "share key": agree(
            KEYS[FIRST], PARTIES[SECOND].public_key, salt=bytes.fromhex(SALT), info=b"fedgrade-secure-sum-1 share"
        ).hex(),
        "secret of shares": join({1: bytes(32) + b"\x05", 2: bytes(32) + b"\x07", 5: bytes(32) + b"\x11"}).hex(),
        "prime": PRIME,
        "payload types": [
            payload_type(kind) for kind in (ShareKey, SumCommitment, MaskedVector, SurvivorVote, RevealedShares)
        ],
    }
    frozen("secure-sum.json", (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            SumCommitment(terms_digest="a", site=FIRST, public_key="00" * 32, seed_digest="", shares={}),
            b'{"public_key":"' + b"00" * 32 + b'","seed_digest":"","shares":{},"site":"site-00","terms_digest":"a"}',
        ),
        (
            RevealedShares(transcript="a", site=FIRST, seed_shares={FIRST: bytes(33)}, key_shares={}),
            b'{"key_shares":{},"seed_shares":{"site-00":"' + b"A" * 44 + b'"},"site":"site-00","transcript":"a"}',
        ),
    ],
)
def test_documents_are_spelt_as_published(document, expected):
    assert encode(document) == expected
