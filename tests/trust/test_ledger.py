import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrade.errors import LedgerBroken, LedgerUnavailable
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.ledger import (
    GENESIS_PREVIOUS,
    MAX_ENTRY_BYTES,
    Entry,
    LedgerWriter,
    _end_of_envelope,
    open_receipt,
    read_ledger,
)
from fedgrade.trust.records import (
    Abort,
    AccountKey,
    Commit,
    DatasetOpened,
    DiscreteGaussian,
    Genesis,
    PlanAccepted,
    PoissonGaussian,
    Released,
    Reserve,
    RoundClosed,
)

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
SITE = SiteId("site-1")
ACCOUNT = AccountKey(partner=SITE, lineage="panels", cohort="2026-06", partition="train")


def reserve(round_index=0, mechanism=None):
    return Reserve(
        job="a" * 64,
        round_index=round_index,
        attempt=0,
        purpose="train",
        accounts=(ACCOUNT,),
        mechanism=mechanism or DiscreteGaussian(sensitivity=2**20, scale=10_123_457),
        weights_digest="b" * 64,
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
    PlanAccepted(job="a" * 64, job_envelope="{}", mode="local", participants=5, accounts=(ACCOUNT,)),
    reserve(),
    Commit(reserve=3, job="a" * 64, round_index=0, attempt=0, purpose="train", message_digest="d" * 64),
    reserve(1, PoissonGaussian(sampling_rate=Fraction(1, 20), noise_multiplier=Fraction(1433, 512), steps=10)),
    Abort(reserve=5, reason="ModelRefused"),
    RoundClosed(
        job="a" * 64,
        round_index=0,
        attempt=0,
        purpose="train",
        receipts={SITE: "e" * 64, SiteId("site-2"): "f" * 64},
        weights_before="0" * 64,
        weights_after="1" * 64,
    ),
    Released(job="a" * 64, release_digest="2" * 64),
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


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A small ledger, line by line, and the folder of a test's own copies."""
    path = write(tmp_path_factory.mktemp("ledger") / "ledger.jsonl", EVERY_KIND[2:5])
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "ledger.jsonl"


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


# --- power cuts, full disks, second writers -----------------------------------------------------------------------


def test_a_torn_last_line_is_mended_whatever_its_length_without_losing_a_whole_entry(ledger):
    before, last = write(ledger, EVERY_KIND[-1:]).read_bytes().splitlines(keepends=True)
    # Every length is judged; the disk sees every thirteenth, and each one where the envelope closes its brackets.
    assert all(_end_of_envelope(last[:length]) == 0 for length in range(1, len(last) - 1))
    for length in [*range(1, len(last) - 100, 13), *range(len(last) - 100, len(last))]:
        ledger.write_bytes(before + last[:length])
        whole_but_for_its_newline = length == len(last) - 1
        seen, head = reopened(ledger)
        assert len(seen) == head.entries == 1 + whole_but_for_its_newline
        assert ledger.read_bytes() == (before + last if whole_but_for_its_newline else before)


def test_a_reader_does_not_mend_and_says_what_is_torn(lines, ledger):
    for length in (1, len(lines[3]) - 4, len(lines[3]) - 1):
        torn = b"".join(lines[:3]) + lines[3][:length]
        ledger.write_bytes(torn)
        with pytest.raises(LedgerBroken, match="entry 3: torn"):
            list(read_ledger(ledger, key=KEY.public))
        assert ledger.read_bytes() == torn


def test_a_ledger_torn_in_its_first_line_begins_anew_and_goes_on(lines, ledger):
    for length in (1, len(lines[0]) // 2, len(lines[0]) - 3):
        ledger.write_bytes(lines[0][:length])
        assert bodies_of(write(ledger, [reserve()])) == [Genesis(owner=SITE, key=KEY.public, role="site"), reserve()]


def test_torn_fragments_are_kept_aside_one_after_another(lines, ledger):
    for length in (10, 20):
        ledger.write_bytes(b"".join(lines[:2]) + lines[2][:length])
        reopened(ledger)
    aside = ledger.with_name("ledger.jsonl.torn").read_bytes()
    assert aside == lines[2][:10] + b"\n" + lines[2][:20] + b"\n"


def test_after_mending_the_next_entry_follows_the_last_whole_one(lines, ledger):
    ledger.write_bytes(b"".join(lines)[:-9])
    write(ledger, [reserve(5)])
    assert [body.round_index for body in bodies_of(ledger)[1:]] == [0, 0, 5]


def test_a_second_writer_is_refused_until_the_first_is_gone(ledger):
    with (
        LedgerWriter.open(ledger, key=KEY, observe=lambda _: None),
        pytest.raises(LedgerUnavailable, match="another process is writing it"),
    ):
        LedgerWriter.open(ledger, key=KEY, observe=lambda _: None)
    reopened(ledger)


def test_a_second_process_is_refused(ledger):
    program = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", program, ledger]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(LedgerUnavailable, match="another process is writing it"):
            LedgerWriter.open(ledger, key=KEY, observe=lambda _: None)
        holder.communicate(b"\n")


def test_a_broken_ledger_does_not_stay_locked(lines, ledger):
    ledger.write_bytes(lines[1])
    with pytest.raises(LedgerBroken):
        reopened(ledger)
    with ledger.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_ledger_in_a_folder_that_is_not_there_is_unavailable(tmp_path):
    with pytest.raises(LedgerUnavailable, match="No such file"):
        LedgerWriter.open(tmp_path / "none" / "ledger", key=KEY, observe=lambda _: None)


HEADER = """
import os, sys, resource
from datetime import UTC, datetime
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fedgrade.errors import LedgerUnavailable
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.ledger import LedgerWriter
from fedgrade.trust.records import Abort
key = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
now = datetime(2026, 7, 1, 12, tzinfo=UTC)
path = Path(sys.argv[1])
writer = LedgerWriter.open(path, key=key, observe=lambda _: None)
writer.start(owner=SiteId("site-1"), role="site", now=now)
"""


def run(program, *arguments):
    source = HEADER + textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", source, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("room", [1, 100, 500])
def test_a_file_that_may_not_grow_refuses_the_charge_and_stays_whole(ledger, room):
    program = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + int(sys.argv[2]), resource.RLIM_INFINITY))
        before = path.read_bytes()
        for _ in range(3):
            try:
                writer.append(Abort(reserve=0, reason="first"), now=now)
                raise SystemExit("written")
            except LedgerUnavailable as error:
                print(error)
        assert path.read_bytes() == before
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        writer.append(Abort(reserve=0, reason="second"), now=now)
    """
    done = run(program, ledger, str(room))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing was charged or released; free some space") == 3
    assert [body.reason for body in bodies_of(ledger)[1:]] == ["second"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while True:
            os.write(descriptor, bytes(1024))
    except OSError as full:
        assert full.errno == errno.ENOSPC  # noqa: PT017 - how the disk says that it is full
    finally:
        os.close(descriptor)


def refused(writer, number):
    try:
        writer.append(reserve(number), now=NOON)
    except LedgerUnavailable as refusal:
        return str(refusal)
    return ""


def test_a_disk_that_fills_up_refuses_the_charge_and_takes_the_next_once_there_is_room(small_disk):
    ledger, ballast = small_disk / "ledger.jsonl", small_disk / "ballast"
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer:
        writer.start(owner=SITE, role="site", now=NOON)
        fill(ballast)
        # What is left of the ledger's last page takes some entries; then one does not fit, in the middle of a line.
        refusals = [refusal for number in range(1, 100) if (refusal := refused(writer, number))]
        whole = len(bodies_of(ledger))
        assert len(refusals) == 100 - whole > 0
        assert "No space left" in refusals[0]
        ballast.unlink()
        writer.append(reserve(100), now=NOON)
    assert bodies_of(ledger)[-1] == reserve(100)
    assert len(bodies_of(ledger)) == whole + 1


def test_a_writer_that_is_killed_leaves_a_ledger_that_goes_on(ledger):
    program = """
        for round_index in range(100_000):
            writer.append(Abort(reserve=round_index, reason="x" * 3000), now=now)
            print(round_index, flush=True)
    """
    command = [sys.executable, "-c", HEADER + textwrap.dedent(program), ledger]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        while (acknowledged := int(writer.stdout.readline())) < 5:
            pass
        writer.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split()[:-1])])
    seen, head = reopened(ledger)
    assert head.entries == len(seen)
    # Whatever was acknowledged is there; at most the one in flight may be there too.
    assert acknowledged + 1 <= len(seen) - 1 <= acknowledged + 3
    write(ledger, [reserve()])
    assert bodies_of(ledger)[-1] == reserve()


def test_an_append_that_is_interrupted_leaves_the_ledger_as_it_was(ledger):
    write(ledger, [])
    before = ledger.read_bytes()
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer:
        standing = os.fsync
        try:
            os.fsync = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                writer.append(reserve(1), now=NOON)
        finally:
            os.fsync = standing
        assert ledger.read_bytes() == before
        writer.append(reserve(2), now=NOON)
    assert bodies_of(ledger)[-1] == reserve(2)


def test_every_entry_and_the_name_of_a_new_ledger_are_on_disk_before_append_returns(ledger, monkeypatch):
    synced = []
    standing = os.fsync

    def watched(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        standing(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with LedgerWriter.open(ledger, key=KEY, observe=lambda _: None) as writer:
        assert str(ledger.parent) in synced
        synced.clear()
        writer.start(owner=SITE, role="site", now=NOON)
        writer.append(reserve(), now=NOON)
    assert synced == [str(ledger)] * 2
