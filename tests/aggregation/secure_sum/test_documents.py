"""Documents that cannot be, and how large the largest ones get."""

import json
from dataclasses import replace

import pytest

from fedgrade.aggregation.secure_sum.documents import (
    MAX_RECOVERY_SITES,
    SEALED_SHARES_BYTES,
    SumCommitment,
    SumCommitments,
    transcript_of,
)
from fedgrade.errors import FedgradeError, MessageRefused
from fedgrade.trust.canonical import MAX_DOCUMENT_BYTES, decode, encode
from fedgrade.trust.envelope import seal
from tests.aggregation.secure_sum.partnership import KEYS, TASK, Partnership, names

ALICE, BOB = names(2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"participants": (BOB, ALICE)}, "sorted, each once"),
        ({"participants": (ALICE, ALICE)}, "sorted, each once"),
        ({"participants": (ALICE,)}, "1 participants; it takes 2"),
        ({"task": replace(TASK, tolerated_dropouts=1)}, "tolerated_dropouts 1 of 3"),
        ({"task": replace(TASK, tolerated_dropouts=-1)}, "tolerated_dropouts -1 of 3"),
        ({"share_keys": {ALICE: "00" * 32}}, "share_keys belong to every participant"),
        ({"task": replace(TASK, entry_limit=2**63 // 3 + 1)}, "the total could wrap"),
        ({"protocol": "fedgrade-secure-sum-0"}, "protocol"),
    ],
)
def test_impossible_terms_are_refused_by_name(change, match):
    terms = Partnership.of(3).proposal().terms
    # As from the wire, where nothing was checked by the one who made it.
    with pytest.raises(FedgradeError, match=match):
        decode(type(terms), changed(encode(terms), change))


def changed(raw, change):
    plain = json.loads(raw)
    for name, value in change.items():
        plain[name] = json.loads(encode(value)) if name == "task" else value
    return json.dumps(plain).encode()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"job": "xy"}, "secure sum job 'xy'"),
        ({"size": 0}, "size 0"),
        ({"size": 2**26}, "size 67108864"),
        ({"entry_limit": -1}, "entry_limit -1"),
        ({"round_index": -1}, "round -1"),
        ({"attempt": -1}, "attempt -1"),
    ],
)
def test_an_impossible_task_is_refused_by_name(change, match):
    with pytest.raises(MessageRefused, match=match):
        replace(TASK, **change)


def test_the_transcript_depends_on_every_byte_and_on_whose_it_is():
    terms = Partnership.of(3).proposal().terms
    envelopes = {site: site.encode() for site in names(3)}
    swapped = {**envelopes, ALICE: envelopes[BOB], BOB: envelopes[ALICE]}
    longer = {**envelopes, ALICE: envelopes[ALICE] + b" "}
    other = replace(terms, task=replace(TASK, attempt=1))
    found = {transcript_of(terms, one) for one in (envelopes, swapped, longer)} | {transcript_of(other, envelopes)}
    assert len(found) == 4


def test_the_largest_commitments_fit_one_document():
    # Names of 63 letters, every recovery site's share of every other's secrets, inside a signed request.
    sites = [f"{number:063d}" for number in range(MAX_RECOVERY_SITES)]
    commitment = SumCommitment(
        terms_digest="00" * 32,
        site=sites[0],
        public_key="00" * 32,
        seed_digest="00" * 32,
        shares={site: bytes(SEALED_SHARES_BYTES) for site in sites[1:]},
    )
    envelope = seal(commitment, KEYS[ALICE]).decode()
    everybody = SumCommitments(terms_digest="00" * 32, envelopes=dict.fromkeys(sites, envelope))
    assert len(encode(everybody)) * 4 / 3 < MAX_DOCUMENT_BYTES


def test_a_share_of_another_length_is_no_commitment():
    with pytest.raises(MessageRefused, match="each share takes 94 bytes"):
        SumCommitment(terms_digest="00" * 32, site=ALICE, public_key="00" * 32, seed_digest="", shares={BOB: bytes(93)})
