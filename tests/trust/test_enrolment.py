"""Join requests and bundles between strangers, and the order in which sites come and go."""

import base64
import contextlib
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused, FedgradeError, SignatureRefused
from fedgrade.trust.canonical import encode
from fedgrade.trust.enrolment import (
    EnrolmentRefused,
    JoinBundle,
    JoinRequest,
    Membership,
    read_bundle,
    read_request,
    utc_text,
    write_bundle,
    write_request,
)
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import Roster
from fedgrade.trust.records import Revoked
from server.certificates import certify
from tests.trust.small_ledger import KEY, NODE_KEY, NOON, OTHER

REQUEST = JoinRequest(site="north", key=KEY.public, node_key=NODE_KEY, declared_items=400, made=utc_text(NOON))
RECORD = REQUEST.record


def node_key(number):
    key = ec.derive_private_key(number, ec.SECP384R1()).public_key()
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    authority = certify(tmp_path_factory.mktemp("tls"), [], now=datetime.now(UTC)).authority
    return JoinBundle(
        sequence=3,
        issued=utc_text(NOON),
        address="coordinator.example:8443",
        authority=authority.read_text(),
        roster=Roster(coordinator=OTHER.public, sites={"north": KEY.public}),
    )


def test_a_request_that_was_written_is_read_whole(frozen):
    raw = write_request(REQUEST, KEY)
    assert read_request(raw) == REQUEST
    frozen("join-request.json", raw)


def test_a_bundle_that_was_written_is_read_whole(bundle):
    assert read_bundle(write_bundle(bundle, OTHER)) == bundle


@given(st.data())
def test_a_request_with_any_byte_changed_says_nothing_else(data):
    raw = bytearray(write_request(REQUEST, KEY).strip())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(FedgradeError):
        assert read_request(bytes(raw)) == REQUEST


def test_a_paper_that_another_key_signed_is_refused(bundle):
    with pytest.raises(SignatureRefused, match="does not sign for"):
        write_request(REQUEST, OTHER)
    forged = encode_paper(KEY.public.hexadecimal, seal(REQUEST, OTHER))
    with pytest.raises(SignatureRefused, match="signed by key"):
        read_request(forged)
    in_his_name = encode_paper(OTHER.public.hexadecimal, seal(REQUEST, OTHER))
    with pytest.raises(SignatureRefused, match="and names"):
        read_request(in_his_name)
    another = encode_paper(KEY.public.hexadecimal, seal(bundle, KEY))
    with pytest.raises(SignatureRefused, match="and names"):
        read_bundle(another)


def test_a_request_does_not_pass_for_a_bundle(bundle):
    with pytest.raises(DocumentRefused, match="payload type"):
        read_bundle(write_request(REQUEST, KEY))
    with pytest.raises(DocumentRefused, match="payload type"):
        read_request(write_bundle(bundle, OTHER))


def encode_paper(key, sealed):
    return json.dumps({"key": {"hexadecimal": key}, "sealed": sealed.decode()}).encode()


def signed_as(change):
    """A request whose own key signed ``change`` of it, which the class itself would not let anybody make."""
    document = json.loads(encode(REQUEST))
    document.update(change)
    payload = json.dumps(document).encode()
    kind = "application/vnd.fedgrade.joinrequest+json"
    signature = KEY.sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"keyid": KEY.public.key_id, "sig": base64.b64encode(signature).decode()}],
    }
    return encode_paper(KEY.public.hexadecimal, json.dumps(envelope).encode())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"site": "../../etc/passwd"}, "a name is 1 to 63 of"),
        ({"site": "a/b"}, "a name is 1 to 63 of"),
        ({"site": "North"}, "a name is 1 to 63 of"),
        ({"site": ""}, "a name is 1 to 63 of"),
        ({"site": "coordinator"}, "the coordinator's own"),
        ({"declared_items": 0}, "must be at least 1"),
        ({"declared_items": 10**9 + 1}, "at most 1000000000"),
        ({"declared_items": 10**4000}, "at most 1000000000"),
        ({"declared_items": "400"}, "declared_items"),
        ({"node_key": NODE_KEY + " root@host"}, "node key"),
        ({"node_key": NODE_KEY + "\n" + NODE_KEY}, "node key"),
        ({"node_key": "ssh-ed25519 AAAA"}, "node key"),
        ({"node_key": ""}, "node key"),
        ({"made": "yesterday"}, "made 'yesterday'"),
        ({"schema": "fedgrade/join-request/2"}, "schema"),
        ({"admin": True}, "unknown key"),
    ],
)
def test_what_no_partner_could_ask_for_is_one_line_even_if_signed(change, said):
    if said is None:
        assert read_request(signed_as(change)) == REQUEST
        return
    with pytest.raises(FedgradeError, match=said) as refused:
        read_request(signed_as(change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("sequence", 0, "sequence 0"),
        ("address", "coordinator", "host:port"),
        ("address", "host:0", "host:port"),
        ("address", "host:70000", "host:port"),
        ("address", "host:1\n", "host:port"),
        ("address", "http://host:1", "host:port"),
        ("authority", "-----BEGIN CERTIFICATE-----", "no certificate"),
        ("issued", "", "issued"),
    ],
)
def test_what_no_coordinator_could_give_is_refused(bundle, name, value, said):
    with pytest.raises(DocumentRefused, match=said):
        replace(bundle, **{name: value})


def test_an_oversized_paper_is_refused_unread():
    with pytest.raises(DocumentRefused, match="the limit is"):
        read_request(b" " * (2**20 + 1))


def test_a_fingerprint_is_taken_however_it_was_spaced():
    key = KEY.public
    assert len(key.fingerprint.replace(" ", "")) == 32
    for text in (
        key.fingerprint,
        key.fingerprint.upper(),
        key.fingerprint.replace(" ", ":"),
        key.key_id[:32],
        key.key_id,
    ):
        assert key.has_fingerprint(text)
    for text in ("", key.fingerprint[:-1], key.key_id[:-1], key.hexadecimal, OTHER.public.fingerprint):
        assert not key.has_fingerprint(text)


REVOKED = Revoked(site="north", key=KEY.public, reason="left")
SOUTH = replace(RECORD, site="south", key=OTHER.public, node_key=node_key(6))


def test_sites_come_renew_and_go():
    newer = replace(RECORD, declared_items=500, node_key=node_key(7))
    members = Membership.of([RECORD, SOUTH, newer])
    assert members.keys == {"north": KEY.public, "south": OTHER.public}
    assert members.current["north"].declared_items == 500
    gone = members.after(REVOKED)
    assert gone.keys == {"south": OTHER.public}
    assert gone.former == {"north": REVOKED}


@pytest.mark.parametrize(
    ("bodies", "said"),
    [
        ([REVOKED], "is not enrolled with that key"),
        ([RECORD, replace(REVOKED, key=OTHER.public)], "is not enrolled with that key"),
        ([RECORD, REVOKED, REVOKED], "is not enrolled with that key"),
        ([RECORD, replace(RECORD, key=OTHER.public)], "enrolled with another key"),
        ([RECORD, replace(RECORD, site="south", node_key=node_key(6))], "is enrolled as north"),
        ([RECORD, replace(SOUTH, node_key=NODE_KEY)], "is enrolled as north"),
        ([RECORD, REVOKED, RECORD], "was revoked, for good"),
        ([RECORD, REVOKED, replace(SOUTH, site="north")], "was revoked, for good"),
        ([RECORD, REVOKED, replace(SOUTH, key=KEY.public)], "was revoked, for good"),
    ],
)
def test_a_name_and_a_key_belong_together_for_life(bodies, said):
    with pytest.raises(EnrolmentRefused, match=said):
        Membership.of(bodies)
