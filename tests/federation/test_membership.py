"""Sites that were enrolled and revoked, as the verifier finds them in a coordinator's ledger."""

from dataclasses import replace
from datetime import datetime

import pytest

from fedgrade.errors import SignatureRefused
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.canonical import encode
from fedgrade.trust.identity import Roster, SigningKey
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from fedgrade.trust.records import Enrolled, Revoked
from tests.federation.small_federation import NAMES
from tests.federation.spoilt_folder import refused
from tests.trust.small_ledger import NODE_KEY

SITE, GENESIS, EVALUATED, RELEASED = NAMES[0], 0, 3, 4


@pytest.fixture
def enrolled(copy):
    return Enrolled(site=SITE, key=copy.site_keys[SITE].public, node_key=NODE_KEY, declared_items=400)


@pytest.fixture
def revoked(enrolled):
    return Revoked(site=SITE, key=enrolled.key, reason="left the market")


def recorded_after(copy, places):
    """The coordinator's ledger with more bodies after some entries, each entry at its own time."""
    key, path = copy.coordinator_key, copy.root / "coordinator" / "ledger.jsonl"
    entries = list(read_ledger(path, key=key.public))
    path.unlink()
    with LedgerWriter.open(path, key=key, observe=lambda _: None) as writer:
        for number, entry in enumerate(entries):
            for body in (entry.body, *places.get(number, [])):
                writer.append(body, now=datetime.fromisoformat(entry.time))


def without(copy, site):
    """The folder's roster after ``site`` was taken off it."""
    rest = {name: key for name, key in copy.roster.sites.items() if name != site}
    (copy.root / "roster.json").write_bytes(encode(replace(copy.roster, sites=rest)))


def test_what_a_site_contributed_before_it_was_revoked_still_verifies(copy, enrolled, revoked):
    recorded_after(copy, {GENESIS: [enrolled], RELEASED: [revoked]})
    without(copy, SITE)
    proof = verify_federation(copy.root)
    assert SITE in proof.sites
    assert proof.roster.key_of(SITE) == enrolled.key


def test_without_its_records_a_site_off_the_roster_vouches_for_nothing(copy):
    without(copy, SITE)
    refused(copy, SITE, "not on the roster", kind=SignatureRefused)


def test_a_site_that_is_counted_after_it_was_revoked_is_found(copy, enrolled, revoked):
    recorded_after(copy, {GENESIS: [enrolled, revoked]})
    refused(copy, f"counts {SITE}, which was revoked before")


def test_a_revocation_before_two_stages_that_counts_the_site_is_found(copy, enrolled, revoked):
    recorded_after(copy, {GENESIS: [enrolled], EVALUATED - 2: [revoked]})
    refused(copy, "entry 5", f"counts {SITE}, which was revoked before")


def test_the_one_stage_that_an_interrupted_run_had_left_open_may_count_it(copy, enrolled, revoked):
    recorded_after(copy, {GENESIS: [enrolled], EVALUATED - 1: [revoked]})
    assert SITE in verify_federation(copy.root).sites


def test_a_site_that_comes_back_after_its_revocation_is_found(copy, enrolled, revoked):
    recorded_after(copy, {GENESIS: [enrolled], RELEASED: [revoked, enrolled]})
    refused(copy, "was revoked, for good")


def test_a_revocation_of_a_stranger_is_found(copy, revoked):
    recorded_after(copy, {RELEASED: [revoked]})
    refused(copy, "is not enrolled with that key")


def test_a_ledger_that_enrolled_another_key_than_the_roster_has_is_found(copy, enrolled):
    recorded_after(copy, {GENESIS: [replace(enrolled, key=SigningKey.generate().public)]})
    refused(copy, f"site {SITE}: the coordinator's ledger enrolled key")


def test_a_trusted_roster_that_still_has_the_site_verifies_too(copy, enrolled, revoked):
    recorded_after(copy, {GENESIS: [enrolled], RELEASED: [revoked]})
    without(copy, SITE)
    trusted = Roster(coordinator=copy.roster.coordinator, sites=copy.roster.sites)
    assert verify_federation(copy.root, roster=trusted).roster.sites == trusted.sites
