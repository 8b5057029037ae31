"""A small ledger, with an entry of every kind."""

from datetime import UTC, datetime, timedelta
from fractions import Fraction

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.ledger import (
    LedgerWriter,
    read_ledger,
)
from fedgrade.trust.records import (
    COORDINATOR,
    Abort,
    AccountKey,
    Checkpoint,
    Commit,
    Correction,
    DatasetOpened,
    DiscreteGaussian,
    Enrolled,
    LedgerState,
    PlanAccepted,
    PoissonGaussian,
    Released,
    Reserve,
    Revoked,
    RoundClosed,
    Software,
)

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
SITE = SiteId("site-1")
ACCOUNT = AccountKey(partner=SITE, lineage="panels", cohort="2026-06", partition="train")

NODE_KEY = (
    "ecdsa-sha2-nistp384 "
    "AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBBHeJKLCUcd3VzysXqAl5GfyCOUdv/mPxU9mYcvlZYOw"
    "N4gvShyil+YKvNvDg22EvI+mlsd0QPktD1g36QoA58UoS0R3VNXe6IyYZTO2kBrrMXdobQro+zMYRBSr5sFxOg=="
)
SOFTWARE = Software(fedgrade="0.1.0", source="5" * 64, libraries={"numpy": "2.4.0", "opendp": "0.16.0"})


def reserve(round_index=0, mechanism=None, transcript=""):
    return Reserve(
        job="a" * 64,
        round_index=round_index,
        attempt=0,
        purpose="train",
        accounts=(ACCOUNT,),
        mechanism=mechanism or DiscreteGaussian(sensitivity=2**20, scale=10_123_457),
        weights_digest="b" * 64,
        transcript=transcript,
        epsilon_limit=Fraction(8),
        delta=Fraction(1, 10**5),
    )


EVERY_KIND = (
    DatasetOpened(
        lineage="panels",
        cohort="2026-06",
        unit="item",
        adjacency="add_or_remove_one",
        photos_per_item=3,
        declared_items=500,
        manifest_commitment="c" * 64,
        composition="mixed",
        epsilon_limit=Fraction(8),
        delta=Fraction(1, 10**5),
    ),
    PlanAccepted(job="a" * 64, job_envelope="{}", mode="local", participants=5, accounts=(ACCOUNT,), software=SOFTWARE),
    reserve(),
    Commit(reserve=3, job="a" * 64, round_index=0, attempt=0, purpose="train", message_digest="d" * 64),
    reserve(
        1,
        PoissonGaussian(
            sampling_rate=Fraction(1, 20), noise_multiplier=Fraction(1433, 512), steps=10, planned_steps=40
        ),
    ),
    Abort(reserve=5, reason="ModelRefused"),
    RoundClosed(
        job="a" * 64,
        round_index=0,
        attempt=0,
        purpose="train",
        receipts={SITE: "e" * 64, SiteId("site-2"): "f" * 64},
        ledgers={SITE: LedgerState(entries=5, root="3" * 64), SiteId("site-2"): LedgerState(entries=9, root="4" * 64)},
        weights_before="0" * 64,
        weights_after="1" * 64,
    ),
    Released(job="a" * 64, release_digest="2" * 64),
    Checkpoint(owner=COORDINATOR, head="{}"),
    Correction(account=ACCOUNT, rho=Fraction(1, 500), reason="the clip was off in round 3"),
    Enrolled(site=SITE, key=KEY.public, node_key=NODE_KEY, declared_items=500),
    Revoked(site=SITE, key=KEY.public, reason="left the market"),
    reserve(2, transcript="6" * 64),
    Released(job="a" * 64, release_digest="2" * 64, bundle="7" * 64),
)


def write(path, bodies, *, key=KEY):
    with LedgerWriter.open(path, key=key, observe=lambda _: None) as writer:
        writer.start(owner=SITE, role="site", now=NOON)
        for number, body in enumerate(bodies):
            writer.append(body, now=NOON + timedelta(seconds=writer.head.entries + number))
    return path


def bodies_of(path, key=KEY):
    return [entry.body for entry in read_ledger(path, key=key.public)]


def reopened(path):
    seen = []
    with LedgerWriter.open(path, key=KEY, observe=seen.append) as writer:
        return seen, writer.head
