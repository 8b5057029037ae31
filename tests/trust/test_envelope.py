import base64
import json
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused, FedgradeError, SignatureRefused
from fedgrade.trust.envelope import open_sealed, payload_type, pre_authentication_encoding, seal
from fedgrade.trust.identity import SigningKey

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))


@dataclass(frozen=True, kw_only=True)
class Letter:
    text: str


@dataclass(frozen=True, kw_only=True)
class Order:
    text: str


LETTER = Letter(text="hello world")
SEALED = seal(LETTER, KEY)


def changed(**fields):
    return json.dumps({**json.loads(SEALED), **fields}).encode()


def resigned(payload, *, kind, key=KEY):
    signature = base64.b64encode(key.sign(pre_authentication_encoding(kind, payload))).decode()
    return changed(
        payload=base64.b64encode(payload).decode(),
        payloadType=kind,
        signatures=[{"keyid": key.public.key_id, "sig": signature}],
    )


def test_what_is_signed_is_the_specifications_own_example():
    # https://github.com/secure-systems-lab/dsse/blob/master/protocol.md, test vectors.
    encoding = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoding == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_lengths_are_of_bytes_not_of_letters():
    assert pre_authentication_encoding("é", "ü".encode()) == b"DSSEv1 2 \xc3\xa9 2 \xc3\xbc"


@given(st.tuples(st.text(max_size=9), st.binary(max_size=9)), st.tuples(st.text(max_size=9), st.binary(max_size=9)))
def test_two_documents_never_share_what_is_signed(one, other):
    one, other = [(kind.encode("utf-8", "replace").decode(), payload) for kind, payload in (one, other)]
    assert (pre_authentication_encoding(*one) == pre_authentication_encoding(*other)) == (one == other)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_opening_gives_back_what_was_sealed(text):
    letter = Letter(text=text)
    assert open_sealed(seal(letter, KEY), as_=Letter, signed_by=KEY.public) == letter


def test_sealing_is_repeatable_so_that_a_resend_has_the_same_bytes():
    assert seal(LETTER, KEY) == SEALED


def test_the_envelope_on_the_wire(frozen):
    frozen("envelope.json", SEALED)


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_an_envelope_with_any_byte_changed_is_refused(position, difference):
    altered = bytearray(SEALED)
    altered[position] ^= difference
    with pytest.raises(FedgradeError):
        open_sealed(bytes(altered), as_=Letter, signed_by=KEY.public)


@given(st.integers(0, len(SEALED) - 1))
def test_a_truncated_envelope_is_refused(length):
    with pytest.raises(DocumentRefused):
        open_sealed(SEALED[:length], as_=Letter, signed_by=KEY.public)


def test_another_key_does_not_open_it():
    with pytest.raises(SignatureRefused, match="signed by key"):
        open_sealed(SEALED, as_=Letter, signed_by=OTHER.public)


def test_another_keys_signature_under_our_name_does_not_pass():
    forged = json.loads(seal(LETTER, OTHER))["signatures"][0]["sig"]
    with pytest.raises(SignatureRefused, match="does not match"):
        open_sealed(changed(signatures=[{"keyid": KEY.public.key_id, "sig": forged}]), as_=Letter, signed_by=KEY.public)


def test_a_letter_does_not_pass_for_an_order_even_with_the_same_fields():
    with pytest.raises(DocumentRefused, match=r"vnd\.fedgrade\.letter\+json"):
        open_sealed(SEALED, as_=Order, signed_by=KEY.public)
    with pytest.raises(SignatureRefused):
        open_sealed(changed(payloadType=payload_type(Order)), as_=Order, signed_by=KEY.public)


def test_a_signed_document_of_the_right_kind_must_still_be_well_formed():
    raw = resigned(b'{"text":7}', kind=payload_type(Letter))
    with pytest.raises(DocumentRefused, match="text"):
        open_sealed(raw, as_=Letter, signed_by=KEY.public)


def test_nothing_is_parsed_before_its_signature_is_checked():
    raw = json.loads(resigned(b"not json at all", kind=payload_type(Letter)))
    raw["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    with pytest.raises(SignatureRefused):
        open_sealed(json.dumps(raw).encode(), as_=Letter, signed_by=KEY.public)


@pytest.mark.parametrize("signatures", [[], json.loads(SEALED)["signatures"] * 2])
def test_exactly_one_signature_is_expected(signatures):
    with pytest.raises(SignatureRefused, match="exactly one"):
        open_sealed(changed(signatures=signatures), as_=Letter, signed_by=KEY.public)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.rstrip("="),
        lambda text: text + "====",
        lambda text: text[:-2] + chr(ord(text[-2]) + 1) + "=",  # the same bytes, other unused bits
        lambda text: text.replace("=", "é"),
        lambda text: text[:4] + "\n" + text[4:],
    ],
)
def test_base64_has_one_spelling(spoil):
    envelope = json.loads(SEALED)
    assert envelope["payload"].endswith("=")
    for fields in (
        {"payload": spoil(envelope["payload"])},
        {"signatures": [{**envelope["signatures"][0], "sig": spoil(envelope["signatures"][0]["sig"])}]},
    ):
        with pytest.raises(DocumentRefused, match="base64"):
            open_sealed(changed(**fields), as_=Letter, signed_by=KEY.public)


def test_unknown_fields_in_an_envelope_are_refused():
    with pytest.raises(DocumentRefused, match="note: unknown key"):
        open_sealed(changed(note="x"), as_=Letter, signed_by=KEY.public)


def test_an_oversized_envelope_is_refused():
    with pytest.raises(DocumentRefused, match="the limit is 100"):
        open_sealed(SEALED, as_=Letter, signed_by=KEY.public, limit=100)
