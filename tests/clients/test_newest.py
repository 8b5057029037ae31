"""What a partner's files say now, without a restart: link, roster, node key, and that it left."""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from clients.joining import REQUEST, create_site
from clients.link import NodeLink, Standing
from clients.newest import NewestLink, by_newest_roster
from clients.node_key import create_node_key, load_node_key, next_node_key, promote_node_key
from clients.settings import read_site
from fedgrade.errors import DocumentRefused, MessageRefused
from fedgrade.trust.enrolment import read_request
from fedgrade.trust.identity import SigningKey, read_roster
from tests.clients.test_joining import (  # noqa: F401 - some are fixtures
    NOW,
    POLICY,
    authority,
    bundle,
    bundle_of,
    home,
    partner,
    taken,
    values,
)


def test_a_link_is_what_the_site_file_says_and_stays_while_that_cannot_be_read(partner, bundle, caplog):  # noqa: F811
    taken(partner, bundle)
    link = NewestLink(partner)
    first = link.now()
    assert first.address == "coordinator.example:8443"
    text = partner.read_text()
    partner.write_text(text.replace("coordinator.example:8443", "other.example:1"))
    assert link.now().address == "other.example:1"
    partner.write_text(text[:100])
    assert link.now().address == "other.example:1"
    assert "the link stays what it was" in caplog.text
    partner.write_text(text)
    assert link.now() == first


def test_a_roster_is_taken_before_the_next_answer_and_without_one_there_is_none(partner, bundle):  # noqa: F811
    taken(partner, bundle)
    rosters = []
    answer = by_newest_roster(read_site(partner), rosters.append, bytes)
    for _ in range(2):
        assert answer(b"x") == b"x"
    assert rosters == [bundle.roster]
    path = partner.parent / "roster.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    for _ in range(2):
        with pytest.raises(MessageRefused, match="its own operator can see why"):
            answer(b"x")
    path.write_bytes(whole)
    assert answer(b"x") == b"x"
    assert rosters == [bundle.roster] * 2


def test_a_bundle_that_is_taken_while_the_site_is_opened_counts_from_the_first_answer_on(partner, bundle):  # noqa: F811
    taken(partner, bundle)
    link, opened_with = NewestLink(partner), [read_roster(partner.parent / "roster.json")]
    newer = replace(
        bundle,
        sequence=3,
        address="other.example:1",
        roster=replace(bundle.roster, sites={**bundle.roster.sites, "east": SigningKey.generate().public}),
    )
    taken(partner, newer)
    answer = by_newest_roster(read_site(partner), opened_with.append, bytes)
    assert answer(b"x") == b"x"
    assert opened_with == [bundle.roster, newer.roster]
    assert link.now().address == "other.example:1"


# `fedgrade site up`, of a site whose operator leaves at another terminal while it is opened.
LEFT_MEANWHILE = """
import sys
from datetime import UTC, datetime
from clients import commands, configure
from clients.leaving import leave

opened = configure.open_site

def and_left(site):
    found = opened(site)
    leave(site, now=datetime.now(UTC))
    return found

configure.open_site = and_left
commands.site(["up", sys.argv[1]])
"""


def test_a_site_that_leaves_while_it_is_opened_does_not_stay_up(home, authority):  # noqa: F811
    # pytest's own folders are too deep for a Unix socket's name.
    with tempfile.TemporaryDirectory(prefix="newest-") as folder:
        create_site(Path(folder) / "node", values(home), POLICY, now=NOW)
        site_file = Path(folder) / "node" / "site.yaml"
        own = read_request((site_file.parent / REQUEST).read_bytes())
        taken(site_file, bundle_of(own, authority))
        ended = subprocess.run(
            [sys.executable, "-c", LEFT_MEANWHILE, site_file], capture_output=True, text=True, check=False, timeout=120
        )
    assert ended.returncode != 0
    assert "left its coordinator on" in ended.stderr.splitlines()[-1]


def standing(tmp_path, **settings):
    create_node_key(tmp_path / "node")
    (tmp_path / "ca.pem").write_text("one")
    link = NodeLink(address="a.example:1", root_certificate=tmp_path / "ca.pem", node_key=tmp_path / "node", **settings)
    return Standing(link)


def test_a_connection_is_made_anew_when_a_file_of_its_link_is_another(tmp_path):
    found = standing(tmp_path)
    assert found.access().root_certificate == b"one"
    assert not found.changed
    (tmp_path / "ca.pem").write_text("another")
    assert found.changed
    assert found.access().root_certificate == b"another"
    assert not found.changed


def test_a_key_that_waits_is_tried_in_turn_and_is_the_key_once_it_was_taken(tmp_path):
    found = standing(tmp_path)
    old, waiting = load_node_key(tmp_path / "node"), next_node_key(tmp_path / "node")
    found.try_other_key()
    assert same(found.access().key, old)
    create_node_key(waiting)
    new = load_node_key(waiting)
    tried = []
    for _ in range(4):
        tried.append(same(found.access().key, new))
        found.try_other_key()
    assert tried == [False, True, False, True]
    found.try_other_key()
    found.access()
    found.signed_on()
    assert not waiting.exists()
    assert same(load_node_key(tmp_path / "node"), new)
    assert found.changed
    assert same(found.access().key, new)


def same(one, other):
    return one.private_numbers() == other.private_numbers()


def test_a_change_of_keys_that_was_interrupted_is_finished(tmp_path):
    create_node_key(tmp_path / "node")
    waiting = next_node_key(tmp_path / "node")
    create_node_key(waiting)
    waiting.with_name(waiting.name + ".pub").replace(tmp_path / "node.pub")
    promote_node_key(tmp_path / "node")
    assert load_node_key(tmp_path / "node")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node", "node.pub"]


def test_a_link_without_its_certificate_says_what_to_do(tmp_path):
    found = standing(tmp_path)
    (tmp_path / "ca.pem").unlink()
    with pytest.raises(DocumentRefused, match="ask the coordinator"):
        found.access()


def test_two_keys_do_not_wait_at_once(tmp_path):
    create_node_key(next_node_key(tmp_path / "node"))
    with pytest.raises(DocumentRefused, match="not overwritten"):
        create_node_key(next_node_key(tmp_path / "node"))
