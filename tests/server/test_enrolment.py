"""A coordinator's book: who comes and goes, and what follows from it, through crashes and hostile requests."""

import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedgrade.errors import DocumentRefused, FedgradeError, SignatureRefused
from fedgrade.trust.canonical import encode
from fedgrade.trust.enrolment import EnrolmentRefused, JoinRequest, read_bundle, utc_text, write_request
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey, read_roster
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from fedgrade.trust.records import COORDINATOR, Enrolled, Genesis, Revoked
from server import coordinator_commands
from server.attached import Listening, admin_authority, announced, only_server
from server.certificates import certify
from server.coordinator_file import CoordinatorSettings, read_settings
from server.coordinator_folder import CoordinatorFolder
from server.enrolment import (
    Book,
    Event,
    NewestBook,
    bring_up_to_date,
    create_coordinator,
    enrol,
    enrolled_nodes,
    node_keys,
    read_book,
    revoke,
)
from server.nodes_file import write_nodes
from server.private_files import ensure_token

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SETTINGS = CoordinatorSettings(
    host="coordinator.example",
    public_port=8443,
    admin_port=8444,
    interface="0.0.0.0",  # noqa: S104
)
NORTH, SOUTH = SigningKey.generate(), SigningKey.generate()


def node_key(number):
    key = ec.derive_private_key(number, ec.SECP384R1()).public_key()
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def request(site="north", key=NORTH, *, number=5, items=400, made=NOW):
    wish = JoinRequest(site=site, key=key.public, node_key=node_key(number), declared_items=items, made=utc_text(made))
    return write_request(wish, key)


@pytest.fixture
def folder(tmp_path):
    create_coordinator(tmp_path / "federation", SETTINGS, now=NOW)
    return CoordinatorFolder(root=tmp_path / "federation")


def enrolled(folder, raw=None, *, now=NOW):
    return enrol(folder, raw or request(), approve=lambda _: None, now=now)


def bodies(folder):
    key = SigningKey.load(folder.key).public
    return [entry.body for entry in read_ledger(folder.ledger, key=key)]


def everything(folder):
    return {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_new_coordinator_keeps_its_secrets_to_itself_and_is_made_once(folder):
    assert read_roster(folder.roster).sites == {}
    assert read_settings(folder.root) == SETTINGS
    for secret in (folder.key, *folder.root.rglob("*.key")):
        assert secret.stat().st_mode & 0o077 == 0
    before = everything(folder)
    with pytest.raises(DocumentRefused, match="not overwritten"):
        create_coordinator(folder.root, SETTINGS, now=NOW)
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", "not a host"),
        ("host", "a\nb"),
        ("host", ""),
        ("public_port", 0),
        ("public_port", 65536),
        ("admin_port", 8443),
        ("interface", "eth0"),
    ],
)
def test_settings_that_nobody_could_listen_on_are_refused(name, value):
    with pytest.raises(DocumentRefused, match="coordinator"):
        replace(SETTINGS, **{name: value})


def test_settings_are_read_strictly(folder):
    path = folder.root / "coordinator.yaml"
    path.write_text(path.read_text() + "debug: true\n")
    with pytest.raises(DocumentRefused, match="debug: unknown key"):
        read_settings(folder.root)


def test_who_is_enrolled_stands_on_the_roster_in_the_bundle_and_in_the_ledger(folder):
    enrolled(folder)
    enrolled(folder, request("south", SOUTH, number=6))
    roster, bundle = read_roster(folder.roster), read_bundle(folder.bundle.read_bytes())
    assert roster.sites == {"north": NORTH.public, "south": SOUTH.public}
    assert bundle.roster == roster
    assert bundle.address == "coordinator.example:8443"
    assert bundle.authority == (folder.root / "superlink" / "ca.pem").read_text()
    assert [body.site for body in bodies(folder)[1:]] == ["north", "south"]
    assert node_keys(folder) == {"north": node_key(5), "south": node_key(6)}


def test_every_bundle_has_a_higher_number_and_none_is_issued_without_need(folder):
    enrolled(folder)
    first = read_bundle(folder.bundle.read_bytes())
    bring_up_to_date(folder, now=NOW + timedelta(days=1))
    assert read_bundle(folder.bundle.read_bytes()) == first
    enrolled(folder, request("south", SOUTH, number=6))
    revoke(folder, "south", reason="left", now=NOW)
    # The roster is the first one again; the bundle is not.
    last = read_bundle(folder.bundle.read_bytes())
    assert last.roster == first.roster
    assert last.sequence == first.sequence + 2


def test_a_new_address_is_a_new_bundle(folder):
    enrolled(folder)
    path = folder.root / "coordinator.yaml"
    path.write_text(path.read_text().replace("8443", "9443"))
    bring_up_to_date(folder, now=NOW)
    bundle = read_bundle(folder.bundle.read_bytes())
    assert (bundle.address, bundle.sequence) == ("coordinator.example:9443", 2)


def test_a_revoked_site_is_gone_for_good(folder):
    enrolled(folder)
    revoke(folder, "north", reason="key was stolen", now=NOW)
    assert read_roster(folder.roster).sites == {}
    assert node_keys(folder) == {}
    assert isinstance(bodies(folder)[-1], Revoked)
    later = NOW + timedelta(days=1)
    for again in (request(made=later), request("north2", made=later), request("north", SOUTH, number=6)):
        with pytest.raises(EnrolmentRefused, match="for good"):
            enrolled(folder, again)
    with pytest.raises(EnrolmentRefused, match="is not on the roster"):
        revoke(folder, "north", reason="again", now=NOW)


def test_newer_numbers_replace_older_ones_and_never_the_other_way(folder):
    enrolled(folder)
    newer = request(items=650, number=7, made=NOW + timedelta(days=1))
    enrolled(folder, newer)
    assert node_keys(folder) == {"north": node_key(7)}
    assert read_book(folder).membership.current["north"].declared_items == 650
    before = everything(folder)
    for stale in (request(), newer):
        with pytest.raises(EnrolmentRefused, match="ask for a new one"):
            enrolled(folder, stale)
    assert everything(folder) == before


@pytest.mark.parametrize(
    "raw",
    [
        request().replace(b"payload", b"Payload", 1),
        request()[:-40],
        request().replace(NORTH.public.hexadecimal.encode(), SOUTH.public.hexadecimal.encode()),
        b"",
        b"{}",
    ],
)
def test_a_tampered_request_changes_nothing(folder, raw):
    before = everything(folder)
    with pytest.raises(FedgradeError):
        enrolled(folder, raw or b" ")
    assert everything(folder) == before


def test_a_request_whose_fingerprint_nobody_vouches_for_changes_nothing(folder, tmp_path):
    (tmp_path / "request.json").write_bytes(request())
    before = everything(folder)
    arguments = [str(folder.root), str(tmp_path / "request.json")]
    wrong = CliRunner().invoke(coordinator_commands.enrol, [*arguments, "--fingerprint", SOUTH.public.fingerprint])
    assert isinstance(wrong.exception, SignatureRefused)
    assert isinstance(CliRunner().invoke(coordinator_commands.enrol, arguments).exception, DocumentRefused)
    assert everything(folder) == before
    right = CliRunner().invoke(coordinator_commands.enrol, [*arguments, "--fingerprint", NORTH.public.fingerprint])
    assert right.exit_code == 0, right.output
    assert "no SuperLink serves this folder now" in right.output
    shown = CliRunner().invoke(coordinator_commands.roster, [str(folder.root)])
    assert "north" in shown.output
    assert "unknown" in shown.output
    assert "no SuperLink serves it" in shown.output


def test_the_roster_is_shown_while_the_superlink_is_being_started_again(folder):
    """Who is enrolled stands in the folder; that nobody answers at the port hides nobody."""
    with socket.socket() as taken, only_server(folder.root):
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        certify(admin_authority(folder.root).parent, [], now=NOW)
        ensure_token(folder.root / "superlink" / "token")
        with announced(folder.root, Listening(address="127.0.0.1:1", admin=f"127.0.0.1:{port}")):
            shown = CliRunner().invoke(coordinator_commands.roster, [str(folder.root)])
    assert shown.exit_code == 0, shown.output
    assert "Who is online is not known: SuperLink 127.0.0.1" in shown.output


@pytest.mark.parametrize("site", ["../coordinator", "a/b", "North", ""])
def test_no_path_passes_for_a_name(folder, site):
    with pytest.raises(DocumentRefused, match="a name is 1 to 63 of"):
        request(site)
    refused = CliRunner().invoke(coordinator_commands.revoke, [str(folder.root), site, "--reason", "x"])
    assert isinstance(refused.exception, DocumentRefused)


def test_a_reason_is_one_line(folder):
    enrolled(folder)
    before = everything(folder)
    for reason in ("", "a\nb", "x" * 501):
        with pytest.raises(DocumentRefused, match="reason"):
            revoke(folder, "north", reason=reason, now=NOW)
    assert everything(folder) == before


def test_a_folder_without_a_book_enrols_nobody(tmp_path):
    with pytest.raises(DocumentRefused, match="fedgrade coordinator init"):
        enrolled(CoordinatorFolder(root=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_while_a_run_holds_the_ledger_the_entry_waits(folder):
    key = SigningKey.load(folder.key)
    with LedgerWriter.open(folder.ledger, key=key, observe=lambda _: None) as writer:
        writer.start(owner=COORDINATOR, role="coordinator", now=NOW)
        enrolled(folder)
        assert read_roster(folder.roster).sites == {"north": NORTH.public}
        assert [type(body) for body in bodies(folder)] == [Genesis]
    bring_up_to_date(folder, now=NOW)
    assert [type(body) for body in bodies(folder)] == [Genesis, Enrolled]


def test_what_a_crash_left_undone_is_done_by_the_next_command(folder):
    enrolled(folder)
    before = {path: content for path, content in everything(folder).items() if path != folder.bundle}
    bundle = read_bundle(folder.bundle.read_bytes())
    folder.bundle.unlink()
    folder.ledger.unlink()
    empty = read_roster(folder.roster)
    folder.roster.write_bytes(encode(replace(empty, sites={})))
    bring_up_to_date(folder, now=NOW)
    assert everything(folder)[folder.roster] == before[folder.roster]
    assert read_bundle(folder.bundle.read_bytes()).sequence == bundle.sequence + 1
    assert [type(body) for body in bodies(folder)] == [Genesis, Enrolled]


def test_an_older_book_than_the_ledger_is_refused(folder):
    enrolled(folder)
    folder.book.write_bytes(seal(Book(sequence=9), SigningKey.load(folder.key)))
    with pytest.raises(DocumentRefused, match="restore its newest copy"):
        enrolled(folder, request("south", SOUTH, number=6))


def with_stranger(book):
    body = Enrolled(site="stranger", key=SOUTH.public, node_key=node_key(8), declared_items=500)
    return replace(book, events=(*book.events, Event(time=utc_text(NOW), requested=utc_text(NOW), body=body)))


@pytest.mark.parametrize("spelt", [encode, lambda book: seal(book, SOUTH)], ids=["unsigned", "by another key"])
def test_a_book_that_the_coordinator_did_not_sign_enrols_nobody(folder, spelt):
    enrolled(folder)
    folder.book.write_bytes(spelt(with_stranger(read_book(folder))))
    before = everything(folder)
    for reads in (node_keys, read_book, lambda own: bring_up_to_date(own, now=NOW)):
        with pytest.raises(
            SignatureRefused, match=r"was not signed by this coordinator .* restore the newest copy"
        ) as told:
            reads(folder)
        assert "\n" not in str(told.value)
    assert everything(folder) == before


def test_who_may_not_read_the_private_key_checks_the_book_by_the_roster(folder):
    enrolled(folder)
    book, key = read_book(folder), SigningKey.load(folder.key)
    folder.key.unlink()
    assert read_book(folder) == book
    folder.book.write_bytes(seal(with_stranger(book), SOUTH))
    with pytest.raises(SignatureRefused, match=key.public.fingerprint):
        read_book(folder)


def test_a_signed_book_of_before_a_revocation_brings_nobody_back(folder):
    enrolled(folder)
    older = folder.book.read_bytes()
    revoke(folder, "north", reason="key was stolen", now=NOW)
    folder.book.write_bytes(older)
    with pytest.raises(DocumentRefused, match=r"put back to an older one.*restore its newest copy"):
        node_keys(folder)
    # Another machine has no bundle yet, and the ledger, which it must have.
    folder.bundle.unlink()
    before = everything(folder)
    with pytest.raises(DocumentRefused, match="does not begin with what the coordinator's ledger says"):
        bring_up_to_date(folder, now=NOW)
    assert everything(folder) == before


@pytest.mark.parametrize("changed", [{"number": 7}, {"items": 650}], ids=["a connection key", "an item count"])
def test_a_signed_book_of_before_any_change_is_refused_for_its_number(folder, changed):
    """Also where neither roster nor bundle says anything new, and while a run keeps the ledger as it was."""
    enrolled(folder)
    older, bundle = folder.book.read_bytes(), read_bundle(folder.bundle.read_bytes())
    with LedgerWriter.open(folder.ledger, key=SigningKey.load(folder.key), observe=lambda _: None):
        enrolled(folder, request(made=NOW + timedelta(days=1), **changed))
    assert read_bundle(folder.bundle.read_bytes()).sequence == bundle.sequence + 1
    folder.book.write_bytes(older)
    for reads in (node_keys, read_book, lambda own: bring_up_to_date(own, now=NOW)):
        with pytest.raises(DocumentRefused, match=r"put back to an older one.*a key that was replaced"):
            reads(folder)


def test_a_change_that_a_crash_kept_from_the_bundle_has_its_number_in_the_next_one(folder):
    enrolled(folder)
    bundle, older = folder.bundle.read_bytes(), folder.book.read_bytes()
    enrolled(folder, request(number=7, made=NOW + timedelta(days=1)))
    folder.bundle.write_bytes(bundle)
    bring_up_to_date(folder, now=NOW)
    assert read_bundle(folder.bundle.read_bytes()).sequence == read_book(folder).sequence
    folder.book.write_bytes(older)
    with pytest.raises(DocumentRefused, match="put back to an older one"):
        node_keys(folder)


def test_whoever_reads_the_book_again_and_again_takes_none_that_is_older_than_before(folder):
    """Also where somebody took the bundle away by which its number is known."""
    enrolled(folder)
    older = folder.book.read_bytes()
    enrolled(folder, request(number=7, made=NOW + timedelta(days=1)))
    write_nodes(folder.root, {"north": 11})
    newest, nodes = NewestBook(), enrolled_nodes(folder.root)
    assert node_keys(folder, newest.read) == {"north": node_key(7)}
    folder.bundle.unlink()
    folder.book.write_bytes(older)
    with pytest.raises(DocumentRefused, match=r"is of number 1, and it was of number 2 before"):
        node_keys(folder, newest.read)
    with pytest.raises(DocumentRefused, match="was of number 2 before"):
        dict(nodes)


def test_a_revocation_is_seen_at_once_by_whoever_holds_the_nodes(folder):
    enrolled(folder)
    enrolled(folder, request("south", SOUTH, number=6))
    with pytest.raises(DocumentRefused, match="enrol the sites first"):
        enrolled_nodes(folder.root)
    write_nodes(folder.root, {"north": 11, "south": 12})
    nodes = enrolled_nodes(folder.root)
    assert dict(nodes) == {"north": 11, "south": 12}
    revoke(folder, "north", reason="left", now=NOW)
    assert dict(nodes) == {"south": 12}
    write_nodes(folder.root, {"south": 13})
    assert nodes["south"] == 13
