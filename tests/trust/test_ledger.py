import os
from datetime import timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused, LedgerBroken, LedgerUnavailable
from fedgrade.trust.canonical import decode, digest, encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SiteId
from fedgrade.trust.ledger import (
    GENESIS_PREVIOUS,
    MAX_ENTRY_BYTES,
    Entry,
    LedgerWriter,
    open_receipt,
    read_ledger,
    roots_at,
)
from fedgrade.trust.records import Abort, Genesis, LedgerState, RoundClosed
from fedgrade.trust.transparency import MerkleTree, open_head, require_consistent
from tests.trust.small_ledger import EVERY_KIND, KEY, NOON, OTHER, SITE, bodies_of, reopened, reserve, write


def test_what_was_appended_is_what_is_read(ledger):
    write(ledger, EVERY_KIND)
    genesis, *rest = bodies_of(ledger)
    assert genesis == Genesis(owner=SITE, key=KEY.public, role="site")
    assert tuple(rest) == EVERY_KIND
    seen, head = reopened(ledger)
    assert [entry.body for entry in seen] == [genesis, *rest]
    assert head.entries == 1 + len(EVERY_KIND)


def test_every_kind_of_entry_on_the_wire(ledger, frozen):
    write(ledger, EVERY_KIND)
    frozen("ledger.jsonl", ledger.read_bytes())
    frozen("entries.jsonl", b"".join(encode(entry) + b"\n" for entry in read_ledger(ledger, key=KEY.public)))


def test_a_ledger_written_long_ago_still_verifies(request):
    vectors = request.path.parents[1] / "vectors"
    entries = [decode(Entry, line) for line in (vectors / "entries.jsonl").read_bytes().splitlines()]
    assert list(read_ledger(vectors / "ledger.jsonl", key=KEY.public)) == entries


@settings(max_examples=20)
@given(st.lists(st.sampled_from(EVERY_KIND), max_size=6), st.integers(0, 6))
def test_writing_in_one_go_or_with_restarts_gives_the_same_ledger(tmp_path_factory, bodies, stop):
    folder = tmp_path_factory.mktemp("ledger")
    at_once = write(folder / "once", bodies)
    write(folder / "twice", bodies[:stop])
    with LedgerWriter.open(folder / "twice", key=KEY, observe=lambda _: None) as writer:
        for number, body in enumerate(bodies[stop:], start=min(stop, len(bodies))):
            writer.append(body, now=NOON + timedelta(seconds=writer.head.entries + number))
    assert (folder / "twice").read_bytes() == at_once.read_bytes()


def test_a_ledger_that_is_not_there_or_empty(ledger):
    with pytest.raises(LedgerBroken, match="No such file"):
        list(read_ledger(ledger, key=KEY.public))
    ledger.touch()
    assert list(read_ledger(ledger, key=KEY.public)) == []


def test_only_its_owner_can_read_a_new_ledger(ledger):
    before = os.umask(0)
    try:
        write(ledger, [])
    finally:
        os.umask(before)
    assert ledger.stat().st_mode & 0o777 == 0o600


# --- tampering ---------------------------------------------------------------------------------------------------


def number_of_the_line_at(lines, position):
    lengths = [len(line) for line in lines]
    return next(number for number in range(len(lines)) if position < sum(lengths[: number + 1]))


@settings(max_examples=300)
@given(st.data())
def test_changing_any_byte_is_noticed_and_the_first_broken_entry_named(lines, tmp_path_factory, data):
    whole = b"".join(lines)
    position = data.draw(st.integers(0, len(whole) - 1))
    altered = bytearray(whole)
    altered[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("altered") / "ledger.jsonl"
    path.write_bytes(altered)
    broken = f"entry {number_of_the_line_at(lines, position)}:"
    with pytest.raises(LedgerBroken, match=broken):
        list(read_ledger(path, key=KEY.public))
    with pytest.raises(LedgerBroken, match=broken):
        LedgerWriter.open(path, key=KEY, observe=lambda _: None)
    assert path.read_bytes() == altered


@pytest.mark.parametrize("byte", [b"x", b" ", b"\r", b"\0", b"}", b"\x0b"])
def test_the_last_newline_cannot_be_traded_for_the_loss_of_a_charge(lines, ledger, byte):
    ledger.write_bytes(b"".join(lines)[:-1] + byte)
    for door in (lambda: list(read_ledger(ledger, key=KEY.public)), lambda: reopened(ledger)):
        with pytest.raises(LedgerBroken, match=f"entry {len(lines) - 1}:"):
            door()


@pytest.mark.parametrize(
    ("rearranged", "broken"),
    [
        ([1, 2, 3], 0),
        ([0, 2, 3], 1),
        ([0, 1, 3], 2),
        ([0, 1, 1, 2, 3], 2),
        ([0, 2, 1, 3], 1),
        ([0, 0, 1, 2, 3], 1),
        ([0, 1, 2, 3, 1], 4),
        ([0, 1, 2, 3, 0], 4),
        ([3, 2, 1, 0], 0),
    ],
)
def test_removed_repeated_or_moved_lines_are_noticed(lines, ledger, rearranged, broken):
    ledger.write_bytes(b"".join(lines[number] for number in rearranged))
    with pytest.raises(LedgerBroken, match=f"entry {broken}:"):
        list(read_ledger(ledger, key=KEY.public))
    with pytest.raises(LedgerBroken, match=f"entry {broken}:"):
        reopened(ledger)


def test_a_blank_line_is_noticed(lines, ledger):
    ledger.write_bytes(b"".join([*lines[:2], b"\n", *lines[2:]]))
    with pytest.raises(LedgerBroken, match="entry 2:"):
        list(read_ledger(ledger, key=KEY.public))


def test_a_line_of_another_ledger_under_the_same_key_is_noticed(lines, ledger, tmp_path):
    elsewhere = write(tmp_path / "elsewhere", [reserve(7), reserve(8)]).read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join([*lines[:2], elsewhere[2], *lines[3:]]))
    with pytest.raises(LedgerBroken, match="entry 2: does not follow"):
        list(read_ledger(ledger, key=KEY.public))


def test_the_ledger_of_another_site_is_refused(lines, ledger):
    ledger.write_bytes(b"".join(lines))
    with pytest.raises(LedgerBroken, match="entry 0:"):
        list(read_ledger(ledger, key=OTHER.public))
    with pytest.raises(LedgerBroken, match="entry 0:"):
        LedgerWriter.open(ledger, key=OTHER, observe=lambda _: None)


def entry(body, *, sequence=0, previous=GENESIS_PREVIOUS, time="2026-07-01T12:00:00.000000+00:00"):
    return Entry(sequence=sequence, previous=previous, time=time, body=body)


@pytest.mark.parametrize(
    ("first", "fault"),
    [
        (entry(reserve()), "genesis"),
        (entry(Genesis(owner=SITE, key=OTHER.public, role="site")), "another key"),
        (entry(Genesis(owner=SITE, key=KEY.public, role="site"), sequence=1), "does not follow"),
        (entry(Genesis(owner=SITE, key=KEY.public, role="site"), previous="1" * 64), "does not follow"),
        (entry(Genesis(owner=SITE, key=KEY.public, role="site"), time="yesterday"), "its time 'yesterday'"),
        (entry(Genesis(owner=SITE, key=KEY.public, role="site"), time="2026-07-01T12:00:00+02:00"), "its time"),
    ],
)
def test_a_signed_first_entry_that_makes_no_sense_is_refused(ledger, first, fault):
    ledger.write_bytes(seal(first, KEY) + b"\n")
    with pytest.raises(LedgerBroken, match=f"entry 0: .*{fault}"):
        list(read_ledger(ledger, key=KEY.public))


def test_a_second_genesis_is_refused(ledger):
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer:
        writer.start(owner=SITE, role="site", now=NOON)
        writer.append(Genesis(owner=SITE, key=KEY.public, role="site"), now=NOON)
    with pytest.raises(LedgerBroken, match="entry 1: a ledger begins with its one genesis"):
        list(read_ledger(ledger, key=KEY.public))


def test_a_clock_that_jumps_back_is_refused_by_the_writer_and_by_the_reader(ledger):
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer:
        writer.start(owner=SITE, role="site", now=NOON)
        before = ledger.read_bytes()
        with pytest.raises(LedgerUnavailable, match="the clock says 2026-07-01T11:59:59"):
            writer.append(reserve(), now=NOON - timedelta(seconds=1))
        assert ledger.read_bytes() == before
        writer.append(reserve(), now=NOON.astimezone(timezone(timedelta(hours=-9))))
        late = entry(reserve(), sequence=2, previous=writer.head.digest, time="2026-07-01T11:00:00.000000+00:00")
    assert len(bodies_of(ledger)) == 2
    ledger.write_bytes(ledger.read_bytes() + seal(late, KEY) + b"\n")
    with pytest.raises(LedgerBroken, match="entry 2: its time '2026-07-01T11:00:00"):
        list(read_ledger(ledger, key=KEY.public))


def test_a_line_without_end_is_refused_without_being_held(ledger, lines):
    ledger.write_bytes(lines[0] + b"x" * (3 * MAX_ENTRY_BYTES))
    with pytest.raises(LedgerBroken, match="entry 1: torn or longer"):
        list(read_ledger(ledger, key=KEY.public))
    with pytest.raises(LedgerBroken, match="entry 1: torn or longer"):
        reopened(ledger)


def test_an_entry_too_long_to_be_read_is_not_written(ledger):
    write(ledger, [])
    before = ledger.read_bytes()
    with (
        LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer,
        pytest.raises(LedgerUnavailable, match=f"the limit is {MAX_ENTRY_BYTES}"),
    ):
        writer.append(Abort(reserve=0, reason="x" * MAX_ENTRY_BYTES), now=NOON)
    assert ledger.read_bytes() == before


# --- receipts ----------------------------------------------------------------------------------------------------


def test_a_receipt_is_the_ledgers_own_line(ledger):
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer:
        writer.start(owner=SITE, role="site", now=NOON)
        appended = writer.append(reserve(), now=NOON)
    assert ledger.read_bytes().splitlines()[appended.sequence] == appended.line
    assert open_receipt(appended.line, key=KEY.public).body == reserve()


@pytest.mark.parametrize("line", [b"", b"{}", seal(reserve(), KEY), seal(entry(reserve()), OTHER)])
def test_a_receipt_that_is_no_entry_of_this_key_is_refused(line):
    with pytest.raises(LedgerBroken):
        open_receipt(line, key=KEY.public)


# --- heads ---------------------------------------------------------------------------------------------------------


def test_the_head_of_a_ledger_is_that_of_its_lines_and_the_same_after_a_restart(ledger):
    write(ledger, EVERY_KIND)
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer:
        sealed = writer.sealed_head(owner=SITE)
    head, lines = open_head(sealed, owner=SITE, signed_by=KEY.public), ledger.read_bytes().splitlines()
    assert (head.entries, head.last_line) == (len(lines), digest(lines[-1]))
    assert {size: root_of(lines[:size]) for size in range(1, len(lines) + 1)} == roots_at(
        ledger, sizes=range(len(lines) + 5)
    )
    assert head.root == root_of(lines)
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer:
        assert writer.sealed_head(owner=SITE) == sealed


def root_of(lines):
    tree = MerkleTree()
    for line in lines:
        tree = tree.after(line)
    return tree.root.hex()


@settings(max_examples=20)
@given(st.lists(st.sampled_from(EVERY_KIND), min_size=1, max_size=9), st.data())
def test_every_earlier_head_of_a_ledger_is_proved_by_its_writer_to_be_its_start(tmp_path_factory, bodies, data):
    heads = []
    with LedgerWriter.open(tmp_path_factory.mktemp("ledger") / "l", key=KEY, observe=lambda _: None) as writer:
        writer.start(owner=SITE, role="site", now=NOON)
        for body in bodies:
            heads.append(open_head(writer.sealed_head(owner=SITE), owner=SITE, signed_by=KEY.public))
            writer.append(body, now=NOON)
        newest = open_head(writer.sealed_head(owner=SITE), owner=SITE, signed_by=KEY.public)
        older = data.draw(st.sampled_from(heads))
        require_consistent(older, newest, writer.tree.consistency(older=older.entries))


def test_an_entry_that_was_refused_is_in_no_head(ledger):
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer:
        writer.start(owner=SITE, role="site", now=NOON)
        before = writer.sealed_head(owner=SITE)
        with pytest.raises(LedgerUnavailable):
            writer.append(reserve(), now=NOON - timedelta(days=1))
        assert writer.sealed_head(owner=SITE) == before


def test_an_empty_ledger_has_no_head(ledger):
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer, pytest.raises(DocumentRefused):
        writer.sealed_head(owner=SITE)


def test_a_round_of_as_many_sites_as_a_job_may_have_fits_into_an_entry(ledger):
    sites = [SiteId(f"{number:04d}-{'x' * 58}") for number in range(1000)]
    state = LedgerState(entries=10**9, root="3" * 64)
    closed = RoundClosed(
        job="a" * 64,
        round_index=10**4,
        attempt=0,
        purpose="evaluate",
        receipts=dict.fromkeys(sites, "e" * 64),
        ledgers=dict.fromkeys(sites, state),
        weights_before="0" * 64,
        weights_after="1" * 64,
    )
    write(ledger, [closed])
    assert bodies_of(ledger)[-1] == closed
