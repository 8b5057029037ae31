"""Power cuts, full disks, second writers: what was acknowledged is there, and the next entry follows it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedgrade.errors import LedgerBroken, LedgerUnavailable
from fedgrade.trust.ledger import (
    LedgerWriter,
    _end_of_envelope,
    read_ledger,
)
from fedgrade.trust.records import (
    Genesis,
)
from tests.trust.small_ledger import EVERY_KIND, KEY, NOON, SITE, bodies_of, reopened, reserve, write


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
