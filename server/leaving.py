"""A partner's leave notice, at its coordinator: held against the book of who was enrolled, and then acted upon."""

from datetime import datetime
from typing import Final

from fedgrade.errors import DocumentRefused, SignatureRefused
from fedgrade.trust.canonical import digest
from fedgrade.trust.enrolment import EnrolmentRefused, LeaveNotice, Membership, read_notice, roster_digest
from fedgrade.trust.identity import PublicKey, Roster, SigningKey
from server.coordinator_folder import CoordinatorFolder
from server.enrolment import Book, read_book, revoke

LEFT: Final = "coordinator/left"  # notices that were acted upon, by site
_DIGITS: Final = 16
_DAY: Final = 10  # characters of a time


def revoke_by_notice(folder: CoordinatorFolder, raw: bytes, *, now: datetime) -> LeaveNotice:
    """Take the site that signed the leave notice ``raw`` off the roster, for good, by its own word; the notice.

    The notice is kept in ``coordinator/left``; the reason of the revocation names it.

    Raises:
        DocumentRefused, SignatureRefused: the notice is malformed, altered, by another key, or for another federation.
        EnrolmentRefused: the site is not on the roster, or asked to be on it after the notice.
    """
    notice, book = read_notice(raw), read_book(folder)
    _require_current(notice, book, folder)
    if _is_strange(notice, book, SigningKey.load(folder.key).public):
        raise DocumentRefused(
            f"leave notice of {notice.site}: names a roster ({notice.roster[:_DIGITS]}) that this coordinator never "
            "had, and is for another federation"
        )
    with folder.kept() as kept:
        kept.write({f"{LEFT}/{notice.site}.json": raw})
    reason = f"left by itself; its signed notice of {notice.made[:_DAY]} has SHA-256 {digest(raw)[:_DIGITS]}"
    revoke(folder, notice.site, reason=reason, now=now)
    return notice


def _require_current(notice: LeaveNotice, book: Book, folder: CoordinatorFolder) -> None:
    standing = book.membership.current.get(notice.site)
    if standing is None:
        raise EnrolmentRefused(f"site {notice.site}: is not on the roster of {folder.root}")
    if standing.key != notice.key:
        raise SignatureRefused(
            f"leave notice of {notice.site}: is signed by {notice.key.fingerprint}; enrolled is "
            f"{standing.key.fingerprint}"
        )
    asked = book.last(notice.site).requested
    if notice.made <= asked:
        raise EnrolmentRefused(
            f"site {notice.site}: its notice is of {notice.made}, and it asked to be enrolled on {asked}, after that"
        )


def _is_strange(notice: LeaveNotice, book: Book, coordinator: PublicKey) -> bool:
    """Whether no roster that ``book`` ever gave rise to, with the site on it, is the one that ``notice`` names."""
    membership = Membership()
    for body in book.bodies:
        membership = membership.after(body)
        roster = Roster(coordinator=coordinator, sites=membership.keys)
        if notice.site in roster.sites and roster_digest(roster) == notice.roster:
            return False
    return True
