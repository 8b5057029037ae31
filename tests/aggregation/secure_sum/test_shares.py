from fractions import Fraction
from itertools import combinations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrade.aggregation.secure_sum.masks import public_bytes
from fedgrade.aggregation.secure_sum.shares import PRIME, join, open_shares, seal_shares, share_cipher, split
from fedgrade.errors import MessageRefused
from tests.aggregation.secure_sum.partnership import names

secrets_of_32 = st.binary(min_size=32, max_size=32)


def interpolated(points, *, at):
    """Lagrange's polynomial through ``points`` by its definition, over the fractions, then into the field."""
    value = Fraction(0)
    for x, y in points:
        term = Fraction(y)
        for other, _ in points:
            if other != x:
                term *= Fraction(at - other, x - other)
        value += term
    return value.numerator * pow(value.denominator, -1, PRIME) % PRIME


@settings(max_examples=40)
@given(secrets_of_32, st.integers(1, 6), st.integers(0, 3))
def test_every_set_of_threshold_shares_gives_the_secret_back_and_agrees_with_plain_interpolation(
    secret, threshold, more
):
    shares = split(secret, shares=threshold + more, threshold=threshold)
    for chosen in combinations(range(1, threshold + more + 1), threshold):
        assert bytes(join({number: shares[number - 1] for number in chosen})) == secret
        points = [(number, int.from_bytes(shares[number - 1])) for number in chosen]
        assert interpolated(points, at=0) == int.from_bytes(secret)


@settings(max_examples=20)
@given(secrets_of_32, secrets_of_32, st.integers(2, 6))
def test_fewer_shares_fit_every_secret(secret, other, threshold):
    known = split(secret, shares=threshold - 1, threshold=threshold)
    # One more point can be chosen so that the same shares stand for any other secret.
    points = [(number, int.from_bytes(share)) for number, share in enumerate(known, start=1)]
    missing = interpolated([(0, int.from_bytes(other)), *points], at=threshold)
    shares = dict(enumerate([*known, missing.to_bytes(33)], start=1))
    assert bytes(join(shares)) == other


@settings(max_examples=20)
@given(secrets_of_32, st.integers(2, 6))
def test_one_share_less_than_the_threshold_foretells_neither_secret_nor_share(secret, threshold):
    shares = split(secret, shares=threshold + 1, threshold=threshold)
    points = [(number, int.from_bytes(share)) for number, share in enumerate(shares, start=1)]
    # A polynomial of a lower degree than it should have would go through one point too few.
    assert interpolated(points[: threshold - 1], at=0) != int.from_bytes(secret)
    assert interpolated(points[: threshold - 1], at=threshold) != points[threshold - 1][1]
    assert interpolated(points[:threshold], at=threshold + 1) == points[threshold][1]


def test_two_splits_of_one_secret_have_no_share_in_common():
    assert not set(split(bytes(32), shares=5, threshold=3)) & set(split(bytes(32), shares=5, threshold=3))


def test_a_value_beyond_the_field_is_refused():
    with pytest.raises(MessageRefused, match="beyond the prime field"):
        join({1: PRIME.to_bytes(33), 2: bytes(33)})


def test_shares_of_two_secrets_are_noticed_when_their_value_is_too_large():
    with pytest.raises(MessageRefused, match="do not belong to one secret"):
        join({1: (PRIME - 1).to_bytes(33)})


def probably_prime(number):
    """Miller and Rabin's test with forty bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        power = pow(base, odd, number)
        if power in {1, number - 1}:
            continue
        if not any(pow(power, 2**step, number) == number - 1 for step in range(1, twos)):
            return False
    return True


def test_the_field_is_the_least_prime_above_every_32_byte_secret():
    assert next(number for number in range(2**256, PRIME + 1) if probably_prime(number)) == PRIME


@pytest.fixture
def ends():
    """What a dealer and a recipient each make of the other's key."""
    dealer, recipient = names(2)
    dealing, receiving = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    parties = {"dealer": dealer, "recipient": recipient, "terms_digest": "ab" * 32}
    return (
        share_cipher(dealing, public_bytes(receiving), **parties),
        share_cipher(receiving, public_bytes(dealing), **parties),
        share_cipher(receiving, public_bytes(dealing), **{**parties, "terms_digest": "cd" * 32}),
        share_cipher(receiving, public_bytes(dealing), **{**parties, "dealer": recipient, "recipient": dealer}),
    )


def test_the_recipient_alone_opens_its_shares_and_in_that_attempt_alone(ends):
    dealing, receiving, other_terms, other_direction = ends
    sealed = seal_shares(dealing, key_share=b"k" * 33, seed_share=b"s" * 33)
    assert open_shares(receiving, sealed, dealer=names(1)[0]) == (b"k" * 33, b"s" * 33)
    for wrong in (other_terms, other_direction):
        with pytest.raises(MessageRefused, match="shares from site-00: do not open"):
            open_shares(wrong, sealed, dealer=names(1)[0])


def test_the_same_shares_sealed_twice_do_not_look_the_same(ends):
    dealing, *_ = ends
    sealed = {seal_shares(dealing, key_share=b"k" * 33, seed_share=b"s" * 33) for _ in range(2)}
    assert len(sealed) == 2


def test_an_altered_share_does_not_open(ends):
    dealing, receiving, *_ = ends
    sealed = seal_shares(dealing, key_share=b"k" * 33, seed_share=b"s" * 33)
    for index in range(0, len(sealed), 7):
        altered = bytearray(sealed)
        altered[index] ^= 1
        with pytest.raises(MessageRefused, match="do not open"):
            open_shares(receiving, bytes(altered), dealer=names(1)[0])
