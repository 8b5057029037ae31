"""Partners that cheat in secure sums, through whole jobs: the job goes on without them, or ends and says what happened.

Nobody honest is ever put out for it.
"""

import base64
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedgrade.aggregation.secure_sum.documents import MaskedVector, RevealedShares, ShareKey, SumCommitment
from fedgrade.aggregation.secure_sum.masks import public_bytes, vector_digest
from fedgrade.aggregation.secure_sum.site import MaskedUpload
from fedgrade.errors import RoundFailed
from fedgrade.federation.messages import (
    AdmitRequest,
    CommitRequest,
    ContributeRequest,
    Refusal,
    RevealRequest,
    VoteRequest,
)
from fedgrade.federation.payloads import write_release
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.canonical import encode
from fedgrade.trust.envelope import open_sealed, payload_type, pre_authentication_encoding, seal
from tests.federation.small_federation import MODEL, NAMES, SmallFederation
from tests.federation.sum_partners import FIVE, Noted, Partners, Wire, at, faithful, paid, said_anew, summing

pytestmark = pytest.mark.usefixtures("quick")
LIAR, HONEST = NAMES[2], NAMES[:2]
ONE_ROUND = summing(minimum_sites=2)
RECOVERING = summing(minimum_sites=3, tolerate_dropouts=1)
EACH_ONCE = {("centre", 0): 1, ("train", 0): 1, ("evaluate", 0): 1}
# A point of low order: whoever agrees with it shares zero with everybody.
LOW_ORDER = bytes(32).hex()


@pytest.fixture
def three(federation):
    with Partners.of(federation) as partners:
        yield partners


@pytest.fixture
def five(tmp_path):
    with Partners.of(SmallFederation.create(tmp_path / "five", names=FIVE)) as partners:
        yield partners


def run(partners, spec, meddle):
    """The job's wire and what was noted, with nobody honest put out; every total was exact."""
    federation = partners.federation
    wire = Wire(partners, meddle)
    with pytest.MonkeyPatch.context() as patch:
        noted = Noted(patch, wire)
        federation.run(federation.job(spec), wire)
    noted.require_exact()
    verify_federation(federation.root, roster=federation.roster)
    return wire, noted


def fails(partners, spec, meddle, match):
    """The job's wire, the job having ended with one error that says ``match``; nobody honest was put out."""
    wire = Wire(partners, meddle)
    with pytest.MonkeyPatch.context() as patch:
        noted = Noted(patch, wire)
        with pytest.raises(RoundFailed, match=match):
            partners.federation.run(partners.federation.job(spec), wire)
    assert not noted.put_out
    return wire


def goes_on_without(partners, spec, liar, meddle):
    """The first stage took a further attempt, without ``liar``; it stays away for a while."""
    wire, noted = run(partners, spec, meddle)
    assert set(noted.put_out) <= {liar}
    assert all(liar not in gathered.sites for _, gathered in noted.gathered)
    assert noted.gathered[0][0] == ("centre", 0, 1)
    honest = [site for site in partners.sites if site != liar]
    assert all(set(paid(partners.federation, site)) == set(EACH_ONCE) for site in honest)
    return wire


def changed(partners, liar, kind, change):
    """Meddles with what ``liar`` says to requests of one kind: ``change(body)`` is its reply's new body."""

    def meddle(site, body, pass_on):
        reply = pass_on()
        return said_anew(partners.federation, site, reply, change) if site == liar and isinstance(body, kind) else reply

    return meddle


def with_commitment(partners, liar, change, **own):
    """``liar`` commits to something else than its software did, and stands by it, with secrets of its ``own``."""
    key = partners.federation.site_keys[liar]

    def commitment(body):
        honest = open_sealed(body.commitment.encode(), as_=SumCommitment, signed_by=key.public)
        said, sums = change(honest, key), partners.sites[liar]._sums._sums
        sums._attempt = replace(sums._attempt, envelope=said.encode(), **own)
        return replace(body, commitment=said)

    return changed(partners, liar, CommitRequest, commitment)


def sealed(commitment, key):
    return seal(commitment, key).decode()


# --- commitments: found out before anybody pays ---------------------------------------------------------------------


def another_job_s(honest, key):
    return sealed(replace(honest, terms_digest="00" * 32), key)


def with_a_key_of_low_order(honest, key):
    return sealed(replace(honest, public_key=LOW_ORDER), key)


def padded_with_spaces(honest, key):
    # Any strict JSON is an envelope; this one alone would fill a message to everybody else.
    return sealed(honest, key).replace(",", "," + 2**21 * " ", 1)


def with_a_padded_payload(honest, key):
    payload = encode(honest).replace(b",", b"," + 2**20 * b" ", 1)
    signature = key.sign(pre_authentication_encoding(payload_type(SumCommitment), payload))
    envelope = sealed(honest, key).split('"')
    envelope[3], envelope[-2] = base64.b64encode(payload).decode(), base64.b64encode(signature).decode()
    return '"'.join(envelope)


def in_another_s_name(honest, key):
    return sealed(replace(honest, site=NAMES[0]), key)


def garbage(honest, key):
    del honest, key
    return "\N{SNOWMAN}" * 99


@pytest.mark.parametrize(
    "change",
    [
        another_job_s, with_a_key_of_low_order, padded_with_spaces, with_a_padded_payload, in_another_s_name, garbage,
    ],
)  # fmt: skip
def test_a_commitment_that_others_would_refuse_is_not_relayed_and_costs_nobody_anything(three, change):
    wire = goes_on_without(three, ONE_ROUND, LIAR, with_commitment(three, LIAR, change))
    assert {site: paid(three.federation, site) for site in NAMES} == {**dict.fromkeys(HONEST, EACH_ONCE), LIAR: {}}
    assert wire.refusals() == []


def test_two_partners_with_one_key_are_found_out_before_anybody_pays(five):
    shared = X25519PrivateKey.generate()

    def twin(honest, key):
        return sealed(replace(honest, public_key=public_bytes(shared).hex()), key)

    twins = {site: with_commitment(five, site, twin, key=shared) for site in FIVE[3:]}
    _, noted = run(
        five, summing(minimum_sites=3), lambda site, body, pass_on: twins.get(site, faithful)(site, body, pass_on)
    )
    assert not noted.put_out
    assert all(len(gathered.sites) < 5 for _, gathered in noted.gathered)
    assert {site: paid(five.federation, site) for site in FIVE[:3]} == dict.fromkeys(FIVE[:3], EACH_ONCE)


def test_another_s_commitment_is_not_one_s_own(three):
    seen = []

    def meddle(site, body, pass_on):
        reply = pass_on()
        if not isinstance(body, CommitRequest):
            return reply
        if site != LIAR:
            seen.append(Wire(three).opened(site, reply).document.body)
            return reply
        return said_anew(three.federation, site, reply, lambda _: seen[-1])

    goes_on_without(three, ONE_ROUND, LIAR, meddle)
    assert all(set(paid(three.federation, site).values()) == {1} for site in HONEST)


@pytest.mark.parametrize("kind", ["none", "garbage", "low order", "another job's"])
def test_a_share_key_that_others_would_refuse_keeps_its_site_out_and_nobody_else(five, kind):
    liar = FIVE[4]

    def meddle(site, body, pass_on):
        reply = pass_on()
        if site != liar or not isinstance(body, AdmitRequest):
            return reply
        key = five.federation.site_keys[liar]
        announced = ShareKey(job="00" * 32, site=liar, public_key=public_bytes(X25519PrivateKey.generate()).hex())
        low = ShareKey(job=five.federation.job(RECOVERING).digest, site=liar, public_key=LOW_ORDER)
        raw = {
            "none": "",
            "garbage": "{}",
            "low order": seal(low, key).decode(),
            "another job's": seal(announced, key).decode(),
        }
        return said_anew(five.federation, liar, reply, lambda said: replace(said, share_key=raw[kind]))

    wire, noted = run(five, RECOVERING, meddle)
    assert set(noted.put_out) == {liar}
    assert wire.refusals() == []
    assert all(gathered.sites == FIVE[:4] for _, gathered in noted.gathered)
    assert {site: paid(five.federation, site) for site in FIVE[:4]} == dict.fromkeys(FIVE[:4], EACH_ONCE)


def test_a_partner_that_always_asks_for_a_further_attempt_does_not_stop_the_job(three):
    later = Refusal(code="attempt", reason="begin a further attempt")
    _, noted = run(three, ONE_ROUND, changed(three, LIAR, CommitRequest, lambda _: later))
    assert not noted.put_out
    assert all(gathered.sites == HONEST for _, gathered in noted.gathered)
    assert {site: paid(three.federation, site) for site in HONEST} == dict.fromkeys(HONEST, EACH_ONCE)


# --- vectors: others have paid, once ----------------------------------------------------------------------------------


def upload(partners, liar, vector_of):
    """The changed software of ``liar`` masks nothing, and vouches for ``vector_of(size)`` with receipt and all."""
    sums = partners.sites[liar]._sums._sums
    real, key = sums.mask, partners.federation.site_keys[liar]

    def mask(vector):
        transcript = sums._attempt.agreed.transcript
        real(vector)
        sent = vector_of(len(vector))
        document = MaskedVector(transcript=transcript, site=liar, vector_digest=vector_digest(sent))
        return MaskedUpload(document=seal(document, key), vector=sent)

    sums.mask = mask


def random_words(size):
    return np.random.default_rng(0).integers(-(2**63), 2**63, size=size, dtype=np.int64)


def test_a_vector_of_another_length_costs_one_attempt_and_its_sender_stays_away(three):
    upload(three, LIAR, lambda size: random_words(size + 1))
    goes_on_without(three, ONE_ROUND, LIAR, faithful)
    assert all(paid(three.federation, site) == {**EACH_ONCE, ("centre", 0): 2} for site in HONEST)


def test_a_garbage_vector_is_nobody_s_by_proof_so_the_job_ends_and_says_what_happened(three):
    upload(three, LIAR, random_words)
    wire = fails(
        three,
        ONE_ROUND,
        faithful,
        r"centre round 0: no attempt came to its end: attempt 0: .*some site did not mask as agreed.*attempt 2: ",
    )
    assert wire.refusals() == []
    assert paid(three.federation, NAMES[0]) == {("centre", 0): 3}


def test_a_contribution_of_an_earlier_attempt_does_not_count(three):
    kept = []

    def meddle(site, body, pass_on):
        if site == NAMES[0] and at(body, ContributeRequest, "centre", attempt=0):
            return None  # so that there is a second attempt
        reply = pass_on()
        if site == LIAR and isinstance(body, ContributeRequest):
            kept.append(Wire(three).opened(site, reply))
            return said_anew(three.federation, site, reply, lambda _: kept[0].document.body, tensors=kept[0].tensors)
        return reply

    wire = fails(three, summing(minimum_sites=2), meddle, "recycler-a did not answer.*recycler-c sent a contribution")
    assert paid(three.federation, NAMES[1]) == {("centre", 0): 2}
    assert wire.refusals() == []


@pytest.mark.parametrize("kind", ["bytes", "voucher", "receipt"])
def test_a_vector_that_its_papers_do_not_vouch_for_does_not_count(three, kind):
    def meddle(site, body, pass_on):
        reply = pass_on()
        if site != LIAR or not isinstance(body, ContributeRequest):
            return reply
        if kind == "bytes":
            tensors = write_release(random_words(MODEL.feature_dimensions))
            return said_anew(three.federation, site, reply, lambda said: said, tensors=tensors)
        change = {"voucher": {"masked": "{}"}, "receipt": {"receipt": "{}\n"}}[kind]
        return said_anew(three.federation, site, reply, lambda said: replace(said, **change))

    goes_on_without(three, ONE_ROUND, LIAR, meddle)
    assert paid(three.federation, NAMES[0]) == {**EACH_ONCE, ("centre", 0): 2}


def test_a_partner_that_stumbles_after_others_paid_gets_one_more_chance_in_a_stage(three):
    later = Refusal(code="attempt", reason="begin a further attempt")
    _, noted = run(three, ONE_ROUND, changed(three, LIAR, ContributeRequest, lambda _: later))
    assert not noted.put_out
    assert noted.gathered[0][0] == ("centre", 0, 2)
    assert paid(three.federation, NAMES[0]) == {**EACH_ONCE, ("centre", 0): 3}


# --- recovery ---------------------------------------------------------------------------------------------------------


def spoilt_for(victims):
    def spoilt(honest, key):
        shares = {site: bytes(len(share)) if site in victims else share for site, share in honest.shares.items()}
        return sealed(replace(honest, shares=shares), key)

    return spoilt


@pytest.mark.parametrize(("victims", "end"), [(FIVE[:2], "a further attempt$"), (FIVE[:4], "; and 1 more$")])
def test_shares_that_do_not_open_end_the_job_and_name_who_dealt_them(five, victims, end):
    """One partner must not be able to choose which others the job goes on without."""
    wire = fails(
        five,
        RECOVERING,
        with_commitment(five, FIVE[4], spoilt_for(victims)),
        r"attempt 2: .*recycler-a refused \(attempt\): shares from recycler-e: do not open.*" + end,
    )
    assert {code for _, code in wire.refusals()} == {"attempt"}
    assert all(set(call) == set(FIVE) for call in wire.calls)
    # Who was dealt them noticed before it charged.
    assert all(paid(five.federation, site) == {} for site in victims)


def test_shares_that_do_not_open_for_as_many_as_may_vanish_cost_nobody_anything(five):
    liar = with_commitment(five, FIVE[4], spoilt_for(FIVE[:1]))
    _, noted = run(five, RECOVERING, liar)
    assert not noted.put_out
    assert all(gathered.sites == FIVE[1:] for _, gathered in noted.gathered)
    assert paid(five.federation, FIVE[1]) == EACH_ONCE


def wrong_shares(partners, liar):
    key = partners.federation.site_keys[liar]

    def change(body):
        honest = open_sealed(body.shares.encode(), as_=RevealedShares, signed_by=key.public)
        shares = {site: bytes(32) + b"\1" for site in honest.seed_shares}
        return replace(body, shares=seal(replace(honest, seed_shares=shares), key).decode())

    return changed(partners, liar, RevealRequest, change)


def test_revealed_shares_that_were_altered_end_the_job_and_say_so(five):
    fails(five, RECOVERING, wrong_shares(five, FIVE[0]), "shares of the seed of recycler-a were altered")
    assert paid(five.federation, FIVE[1]) == {("centre", 0): 3}


def test_a_vote_for_another_set_leaves_its_voter_out_of_the_next_attempt(five):
    goes_on_without(
        five, RECOVERING, FIVE[4], changed(five, FIVE[4], VoteRequest, lambda said: replace(said, vote="{}"))
    )
    assert paid(five.federation, FIVE[0]) == {**EACH_ONCE, ("centre", 0): 2}
