"""The coordinator's book of who was enrolled and revoked, and everything that follows from it.

The book is the truth. The roster, the partners' bundle, the entries in the coordinator's ledger and the SuperLink's
list of nodes follow from it, and are brought up to date by whoever comes next after a crash. It is signed by the
coordinator, whose key is never where others keep the book for it (a database), so that nobody there can enrol a site.
"""

import fcntl
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from fedgrade.errors import DocumentRefused, LedgerUnavailable, SignatureRefused
from fedgrade.federation.store import Documents, write_durably
from fedgrade.trust.canonical import encode
from fedgrade.trust.enrolment import (
    EnrolmentRefused,
    JoinBundle,
    JoinRequest,
    Membership,
    read_bundle,
    read_request,
    utc_text,
    write_bundle,
)
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import PublicKey, Roster, SigningKey, SiteId
from fedgrade.trust.ledger import Entry, LedgerWriter
from fedgrade.trust.records import COORDINATOR, UTC_TIME, Enrolled, Revoked
from server.certificates import certify
from server.coordinator_file import NAME, CoordinatorSettings, read_settings, settings_yaml
from server.coordinator_folder import BOOK, CoordinatorFolder
from server.mirror import EVERYTHING
from server.nodes_file import EnrolledNodes

MAX_BOOK_BYTES: Final = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Event:
    """A site came or went: when, and by a request of which date (empty for a revocation)."""

    time: str
    requested: str
    body: Annotated[Enrolled | Revoked, Field(discriminator="kind")]

    def __post_init__(self) -> None:
        if not UTC_TIME.fullmatch(self.time):
            raise DocumentRefused(f"enrolment: time {self.time[:80]!r} is none")


@dataclass(frozen=True, kw_only=True)
class Book:
    """What ``coordinator/enrolment.json`` seals: all that ever happened, and the number of the newest bundle.

    Guarantee: whatever happens takes a number of its own, which the bundle of then has too. So the bundle, which is
    never where others keep the book, tells an older book from the newest, also where it says nothing new otherwise.
    """

    schema: Literal["fedgrade/enrolment/1"] = "fedgrade/enrolment/1"
    sequence: int = 0
    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        Membership.of(self.bodies)

    @property
    def bodies(self) -> tuple[Enrolled | Revoked, ...]:
        """What stands in the ledger, in this order, sooner or later."""
        return tuple(event.body for event in self.events)

    @property
    def membership(self) -> Membership:
        """Who belongs now, and who did."""
        return Membership.of(self.bodies)

    def last(self, site: SiteId) -> Event:
        """The newest event about ``site``, which the book must know."""
        return next(event for event in reversed(self.events) if event.body.site == site)


def create_coordinator(root: Path, settings: CoordinatorSettings, *, now: datetime) -> PublicKey:
    """A new coordinator in the folder ``root``: key, authority, empty roster, settings; its public key.

    Raises:
        DocumentRefused: there is one already; its key is never overwritten.
    """
    folder = CoordinatorFolder(root=root)
    for path in (folder.key, folder.roster, folder.book, root / NAME):
        if path.exists():
            raise DocumentRefused(f"{path}: exists and is not overwritten; give another folder")
    folder.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = SigningKey.generate()
    key.save(folder.key)
    certify(root / "superlink", [settings.host], now=now)
    write_durably(folder.book, seal(Book(), key))
    write_durably(folder.roster, encode(Roster(coordinator=key.public, sites={})))
    # Last: a folder with settings is whole.
    write_durably(root / NAME, settings_yaml(settings).encode())
    return key.public


def read_book(folder: CoordinatorFolder, *, least: int = 0) -> Book:
    """The book of ``folder``, as the coordinator signed it.

    Raises:
        DocumentRefused: there is none, or it is older than the newest bundle, or than number ``least``.
        SignatureRefused: it is not what this coordinator signed.
    """
    # First: a bundle is written after the book that it follows from.
    issued = 0
    if folder.bundle.exists():
        issued = read_bundle(folder.bundle.read_bytes(), what=f"bundle {folder.bundle}").sequence
    try:
        raw = folder.book.read_bytes()
    except OSError as error:
        raise DocumentRefused(
            f"{folder.book}: cannot be read ({error.strerror}); only a folder made by `fedgrade coordinator init` "
            "enrols partners"
        ) from error
    key = _public_key(folder)
    try:
        book = open_sealed(raw, as_=Book, signed_by=key, what="book", limit=MAX_BOOK_BYTES)
    except (DocumentRefused, SignatureRefused) as error:
        raise SignatureRefused(
            f"{folder.book}: was not signed by this coordinator ({key.fingerprint}), and nobody is enrolled by it; "
            f"restore the newest copy that was ({error})"
        ) from error
    if book.sequence < max(issued, least):
        newer = f"{folder.bundle} is number {issued}" if issued >= least else f"it was of number {least} before"
        raise DocumentRefused(
            f"{folder.book}: is of number {book.sequence}, and {newer}: the book was put back to an older one, which "
            "may enrol who was revoked since, or a key that was replaced; restore its newest copy"
        )
    return book


def enrol(
    folder: CoordinatorFolder, raw: bytes, *, approve: Callable[[JoinRequest], None], now: datetime
) -> JoinRequest:
    """Put the site that signed the join request ``raw`` on the roster, or take newer numbers from it; the request.

    Args:
        folder: the coordinator's.
        raw: the request as it came.
        approve: returns if the request's key is the partner's, by another channel than the request took.
        now: UTC.

    Raises:
        DocumentRefused, SignatureRefused: the request is malformed, altered, or no newer than one that was granted.
        EnrolmentRefused: its name or key is taken or was revoked.
    """
    request = read_request(raw)
    approve(request)
    with _locked(folder) as kept:
        book = read_book(folder)
        granted = book.last(request.site).requested if request.site in book.membership.current else ""
        if request.made <= granted:
            raise EnrolmentRefused(
                f"site {request.site}: its request of {granted} was granted, and this one is of {request.made}; ask "
                "for a new one (`fedgrade site request`)"
            )
        event = Event(time=utc_text(now), requested=request.made, body=request.record)
        _append(folder, kept, replace(book, events=(*book.events, event)), now=now)
    return request


def revoke(folder: CoordinatorFolder, site: SiteId, *, reason: str, now: datetime) -> None:
    """Take ``site`` off the roster for good.

    Raises:
        EnrolmentRefused: it is not on it.
        DocumentRefused: the reason is none.
    """
    with _locked(folder) as kept:
        book = read_book(folder)
        standing = book.membership.current.get(site)
        if standing is None:
            raise EnrolmentRefused(f"site {site}: is not on the roster of {folder.root}")
        event = Event(time=utc_text(now), requested="", body=Revoked(site=site, key=standing.key, reason=reason))
        _append(folder, kept, replace(book, events=(*book.events, event)), now=now)


def bring_up_to_date(folder: CoordinatorFolder, *, now: datetime) -> None:
    """Write what follows from the book and does not stand yet: the roster, a new bundle, entries in the ledger.

    While a run holds the ledger, the run writes the entries, at the end of its stage.
    """
    with _locked(folder, copies=EVERYTHING) as kept:
        book, key = read_book(folder), SigningKey.load(folder.key)
        # First: the ledger knows whether this book is an old one.
        _record(folder, key, now=now)
        following = replace(book, sequence=book.sequence + 1)
        bundle = _bundle(folder, following, now=now)
        _put_roster(folder, bundle.roster)
        if not _is_issued(folder, bundle, number=book.sequence):
            # The number first: one that was given out is never given out again.
            kept.write({BOOK: seal(following, key)})
            write_durably(folder.bundle, write_bundle(bundle, key))


class NewestBook:
    """One folder's book, read again and again; one that is older than what was read before is refused."""

    def __init__(self) -> None:
        self._number = 0

    def read(self, folder: CoordinatorFolder) -> Book:
        """The book of ``folder`` as it is now.

        Raises:
            DocumentRefused, SignatureRefused: as :func:`read_book`, and where it is older than what was read before.
        """
        book = read_book(folder, least=self._number)
        self._number = book.sequence
        return book


def enrolled_nodes(root: Path) -> EnrolledNodes:
    """The nodes of who is enrolled in ``root``, as that changes.

    Raises:
        DocumentRefused: no node was registered yet, or a file is malformed.
    """
    folder = CoordinatorFolder(root=root)
    if folder.book.exists():
        newest = NewestBook()
        return EnrolledNodes(root, lambda: set(newest.read(folder).membership.current), of=folder.book)
    return EnrolledNodes(root, lambda: set(folder.read_roster().sites), of=folder.roster)


def node_keys(folder: CoordinatorFolder, book_of: Callable[[CoordinatorFolder], Book] = read_book) -> dict[SiteId, str]:
    """The public transport key of every enrolled site, in OpenSSH form; ``book_of`` reads the book.

    Raises:
        DocumentRefused: a file is unreadable or malformed.
    """
    if folder.book.exists():
        return {site: body.node_key for site, body in book_of(folder).membership.current.items()}
    # A federation on one machine: partners' folders are beside the coordinator's.
    sites = folder.read_roster().sites
    return {site: (folder.root / "sites" / site / "node_key.pub").read_text().strip() for site in sites}


class LedgerEntries:
    """What of the book stands in the coordinator's ledger; whoever holds the ledger brings the rest there."""

    def __init__(self, folder: CoordinatorFolder) -> None:
        self._folder = folder
        self._standing: list[Enrolled | Revoked] = []

    def observe(self, entry: Entry) -> None:
        """Take note of an entry that stands in the ledger."""
        if isinstance(entry.body, Enrolled | Revoked):
            self._standing.append(entry.body)

    def complete(self, writer: LedgerWriter, *, now: datetime) -> None:
        """Append to ``writer`` what happened since; a federation on one machine has no book, and nothing happens.

        Raises:
            DocumentRefused: the ledger knows what the book does not.
            LedgerUnavailable: the ledger could not be written.
        """
        if not self._folder.book.exists():
            return
        bodies, known = read_book(self._folder).bodies, len(self._standing)
        if bodies[:known] != tuple(self._standing):
            raise DocumentRefused(
                f"{self._folder.book}: does not begin with what the coordinator's ledger says; restore its newest copy"
            )
        for body in bodies[known:]:
            writer.append(body, now=now)
            self._standing.append(body)


def _public_key(folder: CoordinatorFolder) -> PublicKey:
    """The coordinator's; who may not read its private half goes by the roster, which no database has a hand in."""
    return SigningKey.load(folder.key).public if os.access(folder.key, os.R_OK) else folder.read_roster().coordinator


def _append(folder: CoordinatorFolder, kept: Documents, book: Book, *, now: datetime) -> None:
    """Let ``book``, with something new in it, be the newest, and issue the bundle of its number.

    Also of what no bundle shows, such as another connection key: by the number an older book is known.
    """
    key, book = SigningKey.load(folder.key), replace(book, sequence=book.sequence + 1)
    kept.write({BOOK: seal(book, key)})
    _record(folder, key, now=now)
    bundle = _bundle(folder, book, now=now)
    _put_roster(folder, bundle.roster)
    write_durably(folder.bundle, write_bundle(bundle, key))


def _bundle(folder: CoordinatorFolder, book: Book, *, now: datetime) -> JoinBundle:
    """What partners join with by ``book``, under its number."""
    key, settings = SigningKey.load(folder.key), read_settings(folder.root)
    authority = certify(folder.root / "superlink", [settings.host], now=now).authority.read_text()
    roster = Roster(coordinator=key.public, sites=book.membership.keys)
    return JoinBundle(
        sequence=book.sequence, issued=utc_text(now), address=settings.address, authority=authority, roster=roster
    )


def _put_roster(folder: CoordinatorFolder, roster: Roster) -> None:
    if not folder.roster.exists() or folder.read_roster() != roster:
        write_durably(folder.roster, encode(roster))


def _is_issued(folder: CoordinatorFolder, bundle: JoinBundle, *, number: int) -> bool:
    """Whether the newest bundle has this ``number`` and says what ``bundle`` does otherwise, but for its date."""
    if not folder.bundle.exists():
        return False
    standing = read_bundle(folder.bundle.read_bytes(), what=f"bundle {folder.bundle}")
    return standing.sequence == number and replace(standing, sequence=bundle.sequence, issued=bundle.issued) == bundle


def _record(folder: CoordinatorFolder, key: SigningKey, *, now: datetime) -> None:
    entries = LedgerEntries(folder)
    try:
        writer = LedgerWriter.open(folder.ledger, key=key, observe=entries.observe)
    except LedgerUnavailable:
        # A run holds it: it writes the entries itself.
        return
    with writer:
        writer.start(owner=COORDINATOR, role="coordinator", now=now)
        entries.complete(writer, now=now)


@contextmanager
def _locked(folder: CoordinatorFolder, *, copies: Collection[str] = ("coordinator",)) -> Iterator[Documents]:
    """Where the book is kept; one at a time, for two commands that read the same book would each write their own."""
    if not folder.key.exists():
        read_book(folder)
    with (folder.book.with_suffix(".lock")).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with folder.kept(copies=copies) as kept:
            if not folder.book.exists():
                read_book(folder)
            yield kept
