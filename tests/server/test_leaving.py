"""A partner leaves by itself: what it types, what the coordinator does with its notice, and notices that are none."""

import contextlib
import os
import tempfile
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.agent import AgentClient, AgentServer, LeaveRefused, Words
from clients.commands import site as partner_commands
from clients.gate import Gate, Mode
from clients.joining import join
from clients.leaving import leave, notice_file, require_not_left
from clients.settings import read_site
from clients.templates import SiteValues, site_yaml
from fedgrade.cli import cli
from fedgrade.errors import DocumentRefused, FedgradeError
from fedgrade.federation.outbox import Outbox
from fedgrade.trust.canonical import digest, encode
from fedgrade.trust.enrolment import (
    EnrolmentRefused,
    JoinRequest,
    LeaveNotice,
    read_notice,
    roster_digest,
    utc_text,
    write_notice,
    write_request,
)
from fedgrade.trust.identity import Roster, SigningKey, read_roster
from fedgrade.trust.ledger import read_ledger
from server.coordinator_file import CoordinatorSettings
from server.coordinator_folder import CoordinatorFolder
from server.enrolment import create_coordinator, enrol, read_book
from server.leaving import revoke_by_notice

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
LATER = NOW + timedelta(days=30)
NORTH, SOUTH = SigningKey.generate(), SigningKey.generate()
SETTINGS = CoordinatorSettings(host="coordinator.example", public_port=1, admin_port=2, interface="127.0.0.1")


def wish(site, key, *, number, made=NOW):
    public = ec.derive_private_key(number, ec.SECP384R1()).public_key()
    node_key = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    request = JoinRequest(site=site, key=key.public, node_key=node_key, declared_items=400, made=utc_text(made))
    return write_request(request, key)


@pytest.fixture
def coordinator(tmp_path):
    """A coordinator that enrolled north and south."""
    folder = CoordinatorFolder(root=tmp_path / "coordinator")
    create_coordinator(folder.root, SETTINGS, now=NOW)
    for number, (site, key) in enumerate((("north", NORTH), ("south", SOUTH)), start=1):
        enrol(folder, wish(site, key, number=number), approve=lambda _: None, now=NOW)
    return folder


@pytest.fixture
def partner(coordinator):
    """The settings of north, which joined."""
    # pytest's own folders are too deep for a Unix socket's name.
    with tempfile.TemporaryDirectory(prefix="leave-") as name:
        folder = Path(name)
        values = SiteValues(
            site="north", photos="photos", lineage="pumps", cohort="2026", manifest="manifest.csv",
            declared_items=400, photos_per_item=3,
        )  # fmt: skip
        (folder / "site.yaml").write_text(site_yaml(values))
        NORTH.save(folder / "key.pem")
        join(folder / "site.yaml", coordinator.bundle.read_bytes(), approve=lambda _: None)
        yield folder / "site.yaml"


def typed(*arguments, answer=None):
    return CliRunner().invoke(partner_commands, [str(argument) for argument in arguments], input=answer)


def notice_of(folder, site="north", key=NORTH, *, made=LATER, **changes):
    roster = read_roster(folder.roster)
    said = {"site": site, "key": key.public, "roster": roster_digest(roster), "made": utc_text(made), **changes}
    return write_notice(LeaveNotice(**said), key)


def everything(folder):
    return {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_site_that_leaves_starts_no_more_and_its_keys_and_ledger_stay(partner, coordinator):
    site = read_site(partner)
    site.path(site.settings.ledger).write_bytes(b"what was spent\n")
    before = {path: path.read_bytes() for path in partner.parent.iterdir() if path.is_file()}
    told = typed("leave", partner, answer="y\n")
    assert told.exit_code == 0, told.output
    for words in (
        "neither name nor key comes back",
        "its ledger",
        NORTH.public.fingerprint,
        "fedgrade revoke --notice",
    ):
        assert words in told.output
    notice = read_notice(notice_file(site).read_bytes())
    assert notice.roster == digest(encode(read_roster(coordinator.roster)))
    assert {path: path.read_bytes() for path in before} == before
    for command in ("up", "leave"):
        refused = typed(command, partner)
        assert isinstance(refused.exception, DocumentRefused)
        assert "left its coordinator on" in str(refused.exception)
    # Whoever comes to think otherwise joins again, as long as its bundle names it.
    join(partner, coordinator.bundle.read_bytes(), approve=lambda _: None)
    require_not_left(site)


def test_who_says_no_or_has_no_coordinator_does_not_leave(partner):
    assert typed("leave", partner, answer="n\n").exit_code == 1
    require_not_left(read_site(partner))
    (partner.parent / "roster.json").unlink()
    assert "no coordinator that it could leave" in str(typed("leave", partner, "--yes").exception)


def test_answers_that_were_paid_for_are_delivered_first_unless_told(partner):
    site = read_site(partner)
    outbox = Outbox(site.path(site.settings.outbox))
    outbox.keep("0" * 64, b"reply")
    refused = typed("leave", partner, "--yes")
    assert isinstance(refused.exception, LeaveRefused)
    assert "not seen to reach the coordinator: 1;" in str(refused.exception)
    require_not_left(site)
    outbox.delivered("0" * 64)
    assert typed("leave", partner, "--yes").exit_code == 0


def test_an_answer_that_was_lost_is_not_awaited_once_a_newer_one_has_left(tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    for number, name in enumerate(("a", "b", "c")):
        outbox.keep(name * 64, b"reply")
        for suffix in ("pending", "reply"):
            path = tmp_path / "outbox" / f"{name * 64}.{suffix}"
            os.utime(path, ns=(number * 10**9,) * 2)
    outbox.delivered("0" * 64)  # an admission, say: nothing was charged for it
    assert outbox.undelivered == 3
    # A coordinator that goes on does not come back for what was before.
    outbox.delivered("b" * 64)
    assert outbox.undelivered == 1
    outbox.delivered("c" * 64)
    assert outbox.undelivered == 0


def test_told_so_it_leaves_all_the_same(partner):
    site = read_site(partner)
    Outbox(site.path(site.settings.outbox)).keep("0" * 64, b"reply")
    assert typed("leave", partner, "--yes", "--undelivered").exit_code == 0


def test_a_node_that_runs_finishes_its_answer_and_ends_first(partner):
    site, inside, go_on = read_site(partner), threading.Event(), threading.Event()
    outbox, order = Outbox(site.path(site.settings.outbox)), []

    def answer(request):
        inside.set()
        assert go_on.wait(30)
        outbox.keep(digest(request), b"reply")
        order.append("answered")
        return b"reply"

    gate = Gate(answer)

    def node():
        """What `fedgrade site up` does, with nobody on the line but the socket."""
        words = Words(undelivered=lambda: outbox.undelivered)
        with AgentServer(gate, site.socket, words=words, on_delivered=lambda raw: outbox.delivered(digest(raw))):
            up.set()
            assert gate.drained.wait(30)
        order.append("ended")

    def ask():
        with AgentClient(site.socket) as client:
            client.answer(b"question", timeout_seconds=30)

    up = threading.Event()
    threads = [threading.Thread(target=node), threading.Thread(target=ask)]
    threads[0].start()
    assert up.wait(30)
    threads[1].start()
    assert inside.wait(30)
    threading.Timer(0.2, go_on.set).start()
    told = typed("leave", partner, "--yes")
    order.append("left")
    for thread in threads:
        thread.join()
    assert told.exit_code == 0, told.output
    assert order == ["answered", "ended", "left"]
    assert outbox.undelivered == 0


def test_a_running_node_itself_refuses_while_answers_are_undelivered(partner):
    site, gate = read_site(partner), Gate(bytes)
    with AgentServer(gate, site.socket, words=Words(undelivered=lambda: 2)), AgentClient(site.socket) as client:
        assert client.status().undelivered == 2
        with pytest.raises(LeaveRefused, match="not seen to reach the coordinator: 2;"):
            client.leave(even_so=False)
        assert gate.mode is Mode.RUNNING
        assert client.leave(even_so=True).mode is Mode.DRAINING


def test_the_coordinator_revokes_by_the_notice_and_says_that_the_site_left_by_itself(partner, coordinator):
    leave(read_site(partner), now=LATER)
    raw = notice_file(read_site(partner)).read_bytes()
    told = CliRunner().invoke(cli, ["revoke", str(coordinator.root), "--notice", str(notice_file(read_site(partner)))])
    assert told.exit_code == 0, told.output
    assert "north is revoked" in told.output
    assert list(read_roster(coordinator.roster).sites) == ["south"]
    (gone,) = read_book(coordinator).membership.former.values()
    assert gone.reason == f"left by itself; its signed notice of 2026-12-21 has SHA-256 {digest(raw)[:16]}"
    assert (coordinator.key.parent / "left" / "north.json").read_bytes() == raw
    key = SigningKey.load(coordinator.key).public
    assert [entry.body for entry in read_ledger(coordinator.ledger, key=key)][-1] == gone
    with pytest.raises(EnrolmentRefused, match="is not on the roster"):
        revoke_by_notice(coordinator, raw, now=LATER)
    # The bundle that follows does not name it, so that it cannot come back by that.
    with pytest.raises(DocumentRefused, match="it was revoked"):
        join(partner, coordinator.bundle.read_bytes(), approve=lambda _: None)


def test_a_notice_stands_although_others_came_since(coordinator):
    raw = notice_of(coordinator)
    enrol(coordinator, wish("west", SigningKey.generate(), number=9), approve=lambda _: None, now=NOW)
    assert revoke_by_notice(coordinator, raw, now=LATER).site == "north"


def test_a_notice_is_taken_back_by_a_newer_request(coordinator):
    raw = notice_of(coordinator, made=NOW + timedelta(hours=1))
    newer = wish("north", NORTH, number=1, made=NOW + timedelta(hours=2))
    enrol(coordinator, newer, approve=lambda _: None, now=NOW)
    with pytest.raises(EnrolmentRefused, match="after that"):
        revoke_by_notice(coordinator, raw, now=LATER)


def test_notices_that_are_none_change_nothing(coordinator):
    before = everything(coordinator)
    other = replace(read_roster(coordinator.roster), coordinator=SigningKey.generate().public)
    without = Roster(coordinator=other.coordinator, sites={"south": SOUTH.public})
    for raw, error in (
        (notice_of(coordinator, roster=roster_digest(other)), "for another federation"),
        (notice_of(coordinator, roster=roster_digest(without)), "for another federation"),
        (notice_of(coordinator, key=SOUTH), "enrolled is"),
        (notice_of(coordinator, site="west"), "is not on the roster"),
        (notice_of(coordinator).replace(b"payload", b"Payload", 1), "payload"),
        (wish("north", NORTH, number=1), "payload type"),
        (b"{}", "leave notice"),
    ):
        with pytest.raises(FedgradeError, match=error):
            revoke_by_notice(coordinator, raw, now=LATER)
    assert everything(coordinator) == before


@pytest.mark.parametrize("arguments", [[], ["north"], ["--reason", "x"], ["north", "--notice", "N"]])
def test_revoke_wants_one_way_of_saying_who_and_why(coordinator, tmp_path, arguments):
    (tmp_path / "notice.json").write_bytes(notice_of(coordinator))
    given = [str(tmp_path / "notice.json") if argument == "N" else argument for argument in arguments]
    refused = CliRunner().invoke(cli, ["revoke", str(coordinator.root), *given])
    assert refused.exit_code == 2
    assert "either SITE and --reason, or --notice" in refused.output
    assert len(read_roster(coordinator.roster).sites) == 2


@given(st.data())
@settings(max_examples=50)
def test_a_notice_with_any_byte_changed_says_nothing_else(data):
    notice = LeaveNotice(site="north", key=NORTH.public, roster="0" * 64, made=utc_text(NOW))
    raw = bytearray(write_notice(notice, NORTH).strip())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(FedgradeError):
        assert read_notice(bytes(raw)) == notice


def test_a_notice_is_spelt_as_it_always_was(frozen):
    key = SigningKey(key_of_zeros())
    notice = LeaveNotice(site="north", key=key.public, roster="0" * 64, made=utc_text(NOW))
    frozen("leave-notice.json", write_notice(notice, key))


def key_of_zeros():
    return Ed25519PrivateKey.from_private_bytes(bytes(32))
