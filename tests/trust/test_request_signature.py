"""What a request's signature covers: every field, in one spelling, under a name of its own."""

from dataclasses import fields, replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.errors import FedgradeError, MessageRefused, SignatureRefused
from fedgrade.trust.request_signature import MAX_HEADER_CHARACTERS, RequestClaim, is_session, read_header, sign

KEY, OTHER = ec.derive_private_key(7, ec.SECP384R1()), ec.derive_private_key(8, ec.SECP384R1())
CLAIM = RequestClaim(
    method="POST",
    path="/v1/fleet/pull-messages",
    body_digest="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    session="00112233445566778899aabbccddeeff",
    nonce="ffeeddccbbaa99887766554433221100",
    time=1_795_262_400_000_000,
)

hexadecimal = st.text("0123456789abcdef", min_size=32, max_size=32)
claims = st.builds(
    RequestClaim,
    method=st.text("GETPOS", min_size=1, max_size=16),
    path=st.text("abc/-._~", max_size=40).map("/".__add__),
    body_digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    session=hexadecimal,
    nonce=hexadecimal,
    time=st.integers(0, 10**17 - 1),
)


def test_the_bytes_that_are_signed_are_frozen(frozen):
    frozen("request-signature.txt", CLAIM.signed_bytes)


def test_a_header_says_what_was_signed_and_by_whom():
    read = read_header(sign(CLAIM, KEY), method=CLAIM.method, path=CLAIM.path)
    assert read.claim == CLAIM
    read.verify(KEY.public_key())
    with pytest.raises(SignatureRefused, match="not this node key's"):
        read.verify(OTHER.public_key())


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_that_flower_takes_fits_into_the_header(curve):
    key = ec.generate_private_key(curve)
    header = sign(CLAIM, key)
    assert len(header) <= MAX_HEADER_CHARACTERS
    read_header(header, method=CLAIM.method, path=CLAIM.path).verify(key.public_key())


@given(claims, claims)
def test_two_claims_never_share_what_is_signed(one, other):
    assert (one.signed_bytes == other.signed_bytes) == (one == other)


@given(claims, st.data())
def test_any_change_of_any_field_breaks_the_signature(other, data):
    name = data.draw(st.sampled_from([field.name for field in fields(RequestClaim)]))
    changed = replace(CLAIM, **{name: getattr(other, name)})
    signed = read_header(sign(CLAIM, KEY), method=CLAIM.method, path=CLAIM.path)
    if changed == CLAIM:
        signed.verify(KEY.public_key())
    else:
        with pytest.raises(SignatureRefused):
            replace(signed, claim=changed).verify(KEY.public_key())


HEADER = sign(CLAIM, KEY)


@given(st.integers(0, len(HEADER) - 1), st.characters(codec="ascii"))
def test_a_header_with_any_character_changed_is_refused(position, character):
    altered = HEADER[:position] + character + HEADER[position + 1 :]
    if altered != HEADER:
        with pytest.raises(FedgradeError):
            read_header(altered, method=CLAIM.method, path=CLAIM.path).verify(KEY.public_key())


@given(st.one_of(st.text(max_size=600), st.text("1 0af=+/", max_size=600)))
def test_garbage_is_one_refusal(text):
    with pytest.raises(MessageRefused):
        read_header(text, method="POST", path="/v1/fleet/x")


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "/v1/fleet/x?y"},
        {"path": "/v1/fleet/%70ull"},
        {"path": "v1/fleet/x"},
        {"path": "/v1/fleet/x\ny"},
        {"path": "/é"},
        {"method": "post"},
        {"method": "POST "},
        {"nonce": "ff"},
        {"session": "F" * 32},
        {"body_digest": ""},
        {"time": -1},
        {"time": 10**17},
    ],
)
def test_a_claim_that_has_two_readings_cannot_be_made(changes):
    with pytest.raises(MessageRefused, match="is none"):
        replace(CLAIM, **changes)


def test_a_signature_by_flowers_own_scheme_is_none_here():
    plain = KEY.sign(CLAIM.signed_bytes, ec.ECDSA(hashes.SHA256()))
    signed = read_header(sign(CLAIM, KEY), method=CLAIM.method, path=CLAIM.path)
    with pytest.raises(SignatureRefused):
        replace(signed, signature=plain).verify(KEY.public_key())


def test_a_session_has_thirty_two_digits():
    assert is_session(CLAIM.session)
    assert not any(is_session(text) for text in ("", "f" * 31, "f" * 33, "G" * 32, "f" * 32 + "\n"))
