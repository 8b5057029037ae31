"""What a partner's files say now, without a restart: link, roster, node key."""

import pytest

from clients.link import NodeLink, Standing
from clients.newest import NewestLink, by_newest_roster
from clients.node_key import create_node_key, load_node_key, next_node_key, promote_node_key
from clients.settings import read_site
from fedgrade.errors import DocumentRefused, MessageRefused
from tests.clients.test_joining import authority, bundle, home, partner, taken  # noqa: F401 - fixtures


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
    assert answer(b"x") == b"x"
    assert rosters == []
    path = partner.parent / "roster.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    for _ in range(2):
        with pytest.raises(MessageRefused, match="its own operator can see why"):
            answer(b"x")
    path.write_bytes(whole)
    assert answer(b"x") == b"x"
    assert rosters == [bundle.roster]


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
