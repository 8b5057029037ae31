"""An append-only file of signed entries, each bound to the one before it by hash. One writer; nothing is ever changed.

One line an entry: the DSSE envelope of an :class:`Entry`. The chain hash is SHA-256 over the previous line's bytes.
:func:`read_ledger` verifies while it streams; :class:`LedgerWriter` holds the file lock and fsyncs every entry before
it returns. This room knows what entries say (:mod:`fedgrade.trust.records`), not what they cost.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import BinaryIO, Literal, Self

from fedgrade.errors import FedgradeError, LedgerBroken, LedgerUnavailable
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.file_lock import lock_alone
from fedgrade.trust.identity import PublicKey, SigningKey, SiteId
from fedgrade.trust.records import UTC_TIME, Body, Genesis
from fedgrade.trust.transparency import GrowingTree, MerkleTree, TreeHead, sign_head

MAX_ENTRY_BYTES = 2**19  # a closed round of the most sites that a job may have
GENESIS_PREVIOUS = "0" * 64
_READERS = 3  # threads; with more, they wait for the interpreter's lock
_CHUNK_LINES = 128
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a ledger: its place in the chain, when it was written (UTC, ISO 8601), and what it says."""

    schema: Literal["fedgrade/ledger/1"] = "fedgrade/ledger/1"
    sequence: int
    previous: str
    time: str
    body: Body


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where a ledger stands: how many entries, the digest of the last line, and when it was written."""

    entries: int = 0
    digest: str = GENESIS_PREVIOUS
    time: str = ""

    def after(self, entry: Entry, line: bytes) -> "Head":
        """Where it stands once ``entry`` is appended as ``line``, given without its newline."""
        return Head(entries=self.entries + 1, digest=digest(line), time=entry.time)


@dataclass(frozen=True, kw_only=True)
class Appended:
    """An entry that is on disk: its place, and the signed line itself, which serves as a receipt."""

    sequence: int
    line: bytes


def read_ledger(path: Path, *, key: PublicKey) -> Iterator[Entry]:
    """Every entry of the ledger at ``path``, each verified before it is handed over; memory does not grow.

    Raises:
        LedgerBroken: names the first entry that is altered, missing, reordered, torn, dated before the one it follows,
            or signed by another key.
    """
    for _, entry in read_lines(path, key=key):
        yield entry


def read_lines(path: Path, *, key: PublicKey) -> Iterator[tuple[bytes, Entry]]:
    """Like :func:`read_ledger`, each entry with the line that carries it, which is what a receipt repeats."""
    with _opened(path) as file:
        for line, entry, _ in _verified(_lines(file), follows=Head(), key=key, path=path):
            yield line, entry


def roots_at(path: Path, *, sizes: Collection[int]) -> dict[int, str]:
    """The root over the first lines of the ledger at ``path`` for each of ``sizes`` that it reaches, in hexadecimal.

    Nothing is verified: for a ledger that was, whose last root the caller compares.

    Raises:
        LedgerBroken: it cannot be read.
    """
    tree, roots = MerkleTree(), dict[int, str]()
    with _opened(path) as file:
        for line in _lines(file):
            tree = tree.after(line.removesuffix(b"\n"))
            if tree.entries in sizes:
                roots[tree.entries] = tree.root.hex()
    return roots


def open_receipt(line: bytes, *, key: PublicKey) -> Entry:
    """The entry inside a receipt, a single ledger line that has left its ledger.

    Raises:
        LedgerBroken: it was not signed by ``key`` as a ledger entry.
    """
    try:
        return open_sealed(line, as_=Entry, signed_by=key, what="receipt", limit=MAX_ENTRY_BYTES)
    except FedgradeError as error:
        raise LedgerBroken(str(error)) from error


class LedgerWriter:
    """The one process that may append to a ledger.

    Guarantee: when :meth:`append` returns, the entry survives a power cut; when it raises, the ledger is as before.
    """

    def __init__(self, *, path: Path, key: SigningKey, descriptor: int, head: Head, tree: GrowingTree) -> None:
        self.path = path
        self.head = head
        self.key = key
        self.tree = tree
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, *, key: SigningKey, observe: Callable[[Entry], None]) -> Self:
        """The ledger at ``path``, locked and verified; each entry is shown to ``observe``. Creates an empty one.

        A torn last line (a power cut during a write) is kept if it is whole but for its newline, and otherwise set
        aside at the end of ``<path>.torn``: nothing had been released on the strength of it.

        Raises:
            LedgerUnavailable: another process holds the ledger, or the file cannot be opened.
            LedgerBroken: names the first broken entry.
        """
        descriptor, tree = _locked(path), GrowingTree()

        def take(line: bytes, entry: Entry) -> None:
            tree.append(line)
            observe(entry)

        try:
            _sync_directory(path.parent)
            head = _replayed(path, descriptor, key=key.public, observe=take)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path=path, key=key, descriptor=descriptor, head=head, tree=tree)

    def append(self, body: Body, *, now: datetime) -> Appended:
        """Sign ``body`` as the next entry and bring it to disk before returning.

        Raises:
            LedgerUnavailable: the disk refused (full, read-only) or the clock stands before the last entry; the ledger
                is unchanged.
        """
        entry = Entry(
            sequence=self.head.entries,
            previous=self.head.digest,
            time=now.astimezone(UTC).replace(microsecond=0).isoformat(timespec="microseconds"),
            body=body,
        )
        if entry.time < self.head.time:
            raise LedgerUnavailable(
                f"ledger {self.path}: the clock says {entry.time}, before the last entry at {self.head.time}; nothing "
                "was charged or released; set the clock right and ask again; if it had run ahead when that entry was "
                "written, wait until then"
            )
        line = seal(entry, self.key)
        if len(line) >= MAX_ENTRY_BYTES:
            raise LedgerUnavailable(f"ledger {self.path}: entry of {len(line)} bytes; the limit is {MAX_ENTRY_BYTES}")
        self._write(line + b"\n")
        self.head = self.head.after(entry, line)
        self.tree.append(line)
        return Appended(sequence=entry.sequence, line=line)

    def start(self, *, owner: SiteId, role: Literal["site", "coordinator"], now: datetime) -> None:
        """Write the genesis entry if the ledger is empty."""
        if self.head.entries == 0:
            self.append(Genesis(owner=owner, key=self.key.public, role=role), now=now)

    def sealed_head(self, *, owner: SiteId) -> bytes:
        """Where the ledger of ``owner`` stands, signed with the key that signs its entries; the same bytes each time.

        Raises:
            DocumentRefused: it is empty, and says nothing yet.
        """
        head = TreeHead(
            owner=owner,
            entries=self.head.entries,
            root=self.tree.root(self.head.entries).hex(),
            last_line=self.head.digest,
            time=self.head.time,
        )
        return sign_head(head, self.key)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        length = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except BaseException as error:
            # Undo, whatever it was (Ctrl-C too), so that the next append finds a whole ledger; needs no free space.
            os.ftruncate(self._descriptor, length)
            if not isinstance(error, OSError):
                raise
            raise LedgerUnavailable(
                f"ledger {self.path}: could not be written ({error.strerror}); nothing was charged or released; "
                "free some space and ask again"
            ) from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise LedgerBroken(f"ledger {path}: cannot be read ({error.strerror})") from error


def _locked(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LedgerUnavailable(f"ledger {path}: cannot be opened ({error.strerror})") from error
    try:
        locked = lock_alone(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise LedgerUnavailable(f"ledger {path}: cannot be locked ({error.strerror})") from error
    if not locked:
        os.close(descriptor)
        raise LedgerUnavailable(
            f"ledger {path}: another process is writing it; a ledger has one writer, stop the other one first"
        )
    return descriptor


def _sync_directory(folder: Path) -> None:
    """Bring the name of a new file to disk: syncing a file does not sync the folder that says it exists."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise LedgerUnavailable(f"ledger folder {folder}: cannot be brought to disk ({error.strerror})") from error


def _replayed(path: Path, descriptor: int, *, key: PublicKey, observe: Callable[[bytes, Entry], None]) -> Head:
    head, whole = Head(), 0

    def take(lines: Iterable[bytes]) -> None:
        nonlocal head, whole
        for line, entry, after in _verified(lines, follows=head, key=key, path=path):
            observe(line, entry)
            head, whole = after, whole + len(line) + 1

    with _opened(path) as file:
        take(takewhile(lambda line: line.endswith(b"\n"), _lines(file)))
        # Only now, with everything before it found whole, is the last line touched; more than one line is left as is.
        file.seek(whole)
        remains = file.readline(MAX_ENTRY_BYTES)
        if remains and file.read(1) == b"":
            remains = _mended(path, descriptor, remains, whole=whole)
    take([remains] if remains else [])
    return head


def _mended(path: Path, descriptor: int, torn: bytes, *, whole: int) -> bytes:
    """The last line with its newline if only that was lost; otherwise nothing, the fragment being set aside.

    A power cut leaves a beginning of the line. A whole envelope followed by anything but a newline was altered, and its
    charge must not be mended away: it goes back as it is, to be refused as broken.
    """
    end = _end_of_envelope(torn)
    if end == len(torn):
        os.lseek(descriptor, 0, os.SEEK_END)
        os.write(descriptor, b"\n")
        os.fsync(descriptor)
        return torn + b"\n"
    if end:
        return torn
    with path.with_name(path.name + ".torn").open("ab") as aside:
        aside.write(torn + b"\n")
        aside.flush()
        os.fsync(aside.fileno())
    os.ftruncate(descriptor, whole)
    os.fsync(descriptor)
    return b""


def _end_of_envelope(line: bytes) -> int:
    """Where the JSON object at the start of ``line`` ends; 0 if it does not."""
    try:
        # Latin-1 maps every byte to one character, so that positions agree; an envelope is plain ASCII anyway.
        return json.JSONDecoder().raw_decode(line.decode("latin-1"))[1]
    except (ValueError, RecursionError):
        return 0


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of ``file``, each with its newline; one over the limit comes cut, without one."""
    return iter(lambda: file.readline(MAX_ENTRY_BYTES), b"")


def _verified(
    lines: Iterable[bytes], *, follows: Head, key: PublicKey, path: Path
) -> Iterator[tuple[bytes, Entry, Head]]:
    """Each line without its newline, what it says, and the head after it, in order; the first broken one is named."""
    head = follows
    for line, opened in _opened_ahead(lines, key=key):
        where = f"ledger {path}: entry {head.entries}"
        if not line.endswith(b"\n"):
            raise LedgerBroken(f"{where}: torn or longer than {MAX_ENTRY_BYTES} bytes")
        if isinstance(opened, FedgradeError):
            raise LedgerBroken(f"{where}: {opened}") from opened
        _check_place(opened, follows=head, key=key, where=where)
        raw = line.removesuffix(b"\n")
        head = head.after(opened, raw)
        yield raw, opened, head


def _opened_ahead(lines: Iterable[bytes], *, key: PublicKey) -> Iterator[tuple[bytes, Entry | FedgradeError]]:
    """Each line with the entry signed in it, or with why there is none; in order, some hundred lines ahead.

    Most of the time goes into signatures. They need no other line, and the interpreter is free while one is checked;
    what needs the lines in order is left to the caller.
    """
    open_chunk = partial(_opened_chunk, key=key)
    chunks = _chunks(lines)
    # The first chunk here: most ledgers are no longer, and start no thread.
    for chunk in islice(chunks, 1):
        yield from open_chunk(chunk)
    with ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="ledger") as readers:
        ahead = deque(readers.submit(open_chunk, chunk) for chunk in islice(chunks, _READERS + 1))
        while ahead:
            opened = ahead.popleft().result()
            ahead.extend(readers.submit(open_chunk, chunk) for chunk in islice(chunks, 1))
            yield from opened


def _opened_chunk(lines: list[bytes], *, key: PublicKey) -> list[tuple[bytes, Entry | FedgradeError]]:
    opened: list[tuple[bytes, Entry | FedgradeError]] = []
    for line in lines:
        try:
            entry = open_sealed(line.removesuffix(b"\n"), as_=Entry, signed_by=key, limit=MAX_ENTRY_BYTES)
        except FedgradeError as error:
            # What follows a broken line is never believed, so that nothing is lost by stopping here.
            return [*opened, (line, error)]
        opened.append((line, entry))
    return opened


def _chunks(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """``lines`` in lists of ``_CHUNK_LINES``, or fewer where they are long, so that memory stays bounded."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line)
        if len(chunk) == _CHUNK_LINES or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check_place(entry: Entry, *, follows: Head, key: PublicKey, where: str) -> None:
    if entry.sequence != follows.entries or entry.previous != follows.digest:
        raise LedgerBroken(f"{where}: does not follow the entry before it; one was removed, added or moved")
    if not UTC_TIME.fullmatch(entry.time) or entry.time < follows.time:
        raise LedgerBroken(f"{where}: its time {entry.time[:40]!r} is no UTC time at or after the entry before it")
    if isinstance(entry.body, Genesis) != (entry.sequence == 0):
        raise LedgerBroken(f"{where}: a ledger begins with its one genesis entry")
    if isinstance(entry.body, Genesis) and entry.body.key != key:
        raise LedgerBroken(f"{where}: names another key than the one that signs it")
