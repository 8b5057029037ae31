"""Enrolments and revocations in a coordinator's ledger, held against its rounds and against the verifier's roster.

A roster says who is who today. Who was revoked since is not on it, and what it contributed before still stands; its key
is then the one that the coordinator enrolled, which the coordinator's signature vouches for and nobody else.
"""

from dataclasses import replace

from fedgrade.errors import LedgerBroken
from fedgrade.trust.enrolment import EnrolmentRefused, Membership
from fedgrade.trust.identity import Roster
from fedgrade.trust.ledger import Entry
from fedgrade.trust.records import Enrolled, Revoked, RoundClosed


def members_after(members: Membership, entry: Entry, *, where: str) -> Membership:
    """Who belongs once ``entry`` of the coordinator's ledger was written; ``where`` names it.

    Raises:
        LedgerBroken: it enrols or revokes whom it cannot, or counts a site that was revoked before it.
    """
    match entry.body:
        case Enrolled() | Revoked() as body:
            try:
                return members.after(body)
            except EnrolmentRefused as error:
                raise LedgerBroken(f"{where}: {error}") from error
        case RoundClosed() as body:
            if gone := sorted(members.former.keys() & body.receipts.keys()):
                raise LedgerBroken(f"{where}: counts {gone[0]}, which was revoked before")
            return members
        case _:
            return members


def with_former(roster: Roster, members: Membership) -> Roster:
    """``roster`` with the keys of sites that were revoked, for what they signed before.

    Raises:
        LedgerBroken: the ledger enrolled a site of the roster with another key.
    """
    former = {site: body.key for site, body in members.former.items()}
    enrolled = {**members.keys, **former}
    for site, key in roster.sites.items():
        if enrolled.get(site, key) != key:
            raise LedgerBroken(
                f"site {site}: the coordinator's ledger enrolled key {enrolled[site].fingerprint}; the roster has "
                f"{key.fingerprint}"
            )
    return replace(roster, sites={**former, **roster.sites})
