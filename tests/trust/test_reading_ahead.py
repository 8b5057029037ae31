"""Ledgers longer than one chunk are opened by several threads; nothing else about them may differ."""

import json
import threading
from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrade.errors import FedgradeError, LedgerBroken
from fedgrade.trust.envelope import _as_sealed, _as_spelt, open_sealed, payload_type, seal
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.ledger import (
    _CHUNK_BYTES,
    _CHUNK_LINES,
    Entry,
    Head,
    LedgerWriter,
    _chunks,
    read_ledger,
    read_lines,
)
from fedgrade.trust.records import Commit, Genesis

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
SITE = SiteId("site-1")
ENTRIES = 7 * _CHUNK_LINES + 5


def commit(sequence=0):
    return Commit(reserve=sequence, job="a" * 64, round_index=0, attempt=0, purpose="train", message_digest="d" * 64)


def signed_lines(entries):
    """A ledger's lines, each with its newline."""
    head, lines = Head(), []
    for sequence in range(entries):
        entry = Entry(
            sequence=sequence,
            previous=head.digest,
            time=(NOON + timedelta(seconds=sequence)).isoformat(timespec="microseconds"),
            body=commit(sequence) if sequence else Genesis(owner=SITE, key=KEY.public, role="site"),
        )
        line = seal(entry, KEY)
        lines.append(line + b"\n")
        head = head.after(entry, line)
    return lines


@pytest.fixture(scope="module")
def long_ledger():
    return signed_lines(ENTRIES)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_a_long_ledger_is_read_whole_and_in_order(long_ledger, ledger):
    ledger.write_bytes(b"".join(long_ledger))
    read = list(read_lines(ledger, key=KEY.public))
    assert [line + b"\n" for line, _ in read] == long_ledger
    assert [entry.sequence for _, entry in read] == [*range(ENTRIES)]
    seen = []
    with LedgerWriter.open(ledger, key=KEY, observe=seen.append) as writer:
        assert seen == [entry for _, entry in read]
        assert writer.head.entries == ENTRIES
    assert ledger.read_bytes() == b"".join(long_ledger)


@settings(max_examples=15)
@given(st.sets(st.integers(0, ENTRIES - 1), min_size=1, max_size=9))
def test_of_many_broken_entries_the_first_is_named_and_none_from_it_on_is_handed_over(
    long_ledger, tmp_path_factory, broken
):
    lines = [line.replace(b'"sig":"', b'"sig":"AAAA') if n in broken else line for n, line in enumerate(long_ledger)]
    path = tmp_path_factory.mktemp("long") / "ledger.jsonl"
    path.write_bytes(b"".join(lines))
    first, seen = min(broken), []
    with pytest.raises(LedgerBroken, match=f"entry {first}:"):
        seen.extend(entry.sequence for entry in read_ledger(path, key=KEY.public))
    handed_over = []
    with pytest.raises(LedgerBroken, match=f"entry {first}:"):
        LedgerWriter.open(path, key=KEY, observe=handed_over.append)
    assert [entry.sequence for entry in handed_over] == [*range(first)]


@settings(max_examples=15)
@given(st.integers(1, ENTRIES - 1), st.integers(1, ENTRIES - 1))
def test_what_is_wrong_first_is_told_first_whether_order_or_signature(long_ledger, tmp_path_factory, moved, forged):
    lines = [*long_ledger]
    lines[forged] = seal(Entry(sequence=forged, previous="0" * 64, time="", body=commit()), OTHER) + b"\n"
    lines.pop(moved)
    path = tmp_path_factory.mktemp("long") / "ledger.jsonl"
    path.write_bytes(b"".join(lines))
    # A removed line is noticed at the one after it; where that is the forged one, its signature comes first.
    first = moved if moved < forged or (moved == forged and moved < ENTRIES - 1) else forged
    if moved == forged == ENTRIES - 1:
        assert len(list(read_ledger(path, key=KEY.public))) == ENTRIES - 1
        return
    with pytest.raises(LedgerBroken, match=f"entry {first}:"):
        list(read_ledger(path, key=KEY.public))


@pytest.mark.parametrize("whole", [1, _CHUNK_LINES - 1, _CHUNK_LINES, _CHUNK_LINES + 1, 5 * _CHUNK_LINES])
def test_a_torn_line_after_a_broken_entry_is_left_where_it_is(long_ledger, ledger, whole):
    lines = long_ledger[: whole + 1]
    lines[whole - 1] = lines[whole - 1].replace(b'"sig":"', b'"sig":"AAAA')
    altered = b"".join(lines)[:-40]
    ledger.write_bytes(altered)
    with pytest.raises(LedgerBroken, match=f"entry {whole - 1}:"):
        LedgerWriter.open(ledger, key=KEY, observe=lambda _: None)
    assert ledger.read_bytes() == altered
    assert not ledger.with_name("ledger.jsonl.torn").exists()


@pytest.mark.parametrize("whole", [_CHUNK_LINES - 1, _CHUNK_LINES, _CHUNK_LINES + 1, 5 * _CHUNK_LINES])
@pytest.mark.parametrize("lost", [1, 40])
def test_a_torn_line_is_mended_wherever_chunks_end(long_ledger, ledger, whole, lost):
    ledger.write_bytes(b"".join(long_ledger[: whole + 1])[:-lost])
    seen = []
    with LedgerWriter.open(ledger, key=KEY, observe=seen.append):
        # Lost but for its newline, the last entry is whole; otherwise it was never acted upon.
        kept = whole + (lost == 1)
        assert [entry.sequence for entry in seen] == [*range(kept)]
    assert ledger.read_bytes() == b"".join(long_ledger[:kept])


def test_a_reader_who_turns_away_leaves_no_thread_behind(long_ledger, ledger):
    ledger.write_bytes(b"".join(long_ledger))
    before = threading.active_count()
    reading = read_ledger(ledger, key=KEY.public)
    assert len(list(islice(reading, 2 * _CHUNK_LINES))) == 2 * _CHUNK_LINES
    assert threading.active_count() > before
    reading.close()
    assert threading.active_count() == before


def test_a_short_ledger_starts_no_thread(long_ledger, ledger):
    ledger.write_bytes(b"".join(long_ledger[:_CHUNK_LINES]))
    before = threading.active_count()
    assert {threading.active_count() for _ in read_ledger(ledger, key=KEY.public)} == {before}


@given(st.lists(st.integers(0, _CHUNK_BYTES), max_size=12))
def test_chunks_are_all_lines_in_order_and_small(lengths):
    lines = [bytes([number]) * (length // 4) for number, length in enumerate(lengths)]
    chunks = list(_chunks(lines))
    assert [line for chunk in chunks for line in chunk] == lines
    assert all(chunk and sum(map(len, chunk[:-1])) < _CHUNK_BYTES for chunk in chunks)


# --- the short way through an envelope -------------------------------------------------------------------------------

SEALED = seal(commit(), KEY)
KIND = payload_type(Commit)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(SEALED) - 1), st.binary(max_size=3)), max_size=2))
def test_what_is_found_without_a_parser_is_what_the_strict_parser_finds(changes):
    raw = SEALED
    for position, inserted in changes:
        raw = raw[:position] + inserted + raw[position + len(inserted) // 2 :]
    found = _as_sealed(raw, kind=KIND, key=KEY.public, limit=len(raw))
    if found is not None:
        assert found == _as_spelt(raw, kind=KIND, key=KEY.public, name="commit", limit=len(raw))


def test_the_form_that_seal_writes_needs_no_parser():
    found = _as_sealed(SEALED, kind=KIND, key=KEY.public, limit=len(SEALED))
    assert found == _as_spelt(SEALED, kind=KIND, key=KEY.public, name="commit", limit=len(SEALED))
    assert _as_sealed(SEALED, kind=KIND, key=KEY.public, limit=len(SEALED) - 1) is None
    assert _as_sealed(SEALED, kind=KIND, key=OTHER.public, limit=len(SEALED)) is None


@pytest.mark.parametrize(
    "respelt",
    [
        lambda sealed: json.dumps(json.loads(sealed), indent=1).encode(),
        lambda sealed: json.dumps(dict(reversed(json.loads(sealed).items()))).encode(),
        lambda sealed: b" " + sealed + b"\n",
        lambda sealed: sealed.replace(b"payload", b"p\\u0061yload", 1),
        lambda sealed: sealed.replace(b'"payload":"e', b'"payload":"\\u0065'),
    ],
)
def test_other_spellings_of_an_envelope_still_open(respelt):
    raw = respelt(SEALED)
    assert raw != SEALED
    assert open_sealed(raw, as_=Commit, signed_by=KEY.public) == commit()


@pytest.mark.parametrize(
    "hidden", [b'","payload":"e30=', b'","payloadType":"x', b'","signatures":[],"x":"', b'"', b"\\", b"\n", b"\xc3"]
)
def test_nothing_hides_inside_the_payload(hidden):
    with pytest.raises(FedgradeError):
        open_sealed(SEALED.replace(b'"payload":"', b'"payload":"' + hidden), as_=Commit, signed_by=KEY.public)
