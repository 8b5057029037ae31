"""Enrolments and revocations in a coordinator's ledger, held against its rounds and against the verifier's roster.

A roster says who is who today. Who was revoked since is not on it, and what it contributed before still stands; its key
is then the one that the coordinator enrolled, which the coordinator's signature vouches for and nobody else.
"""

from dataclasses import dataclass, field, replace

from fedgrade.errors import LedgerBroken
from fedgrade.trust.enrolment import EnrolmentRefused, Membership
from fedgrade.trust.identity import Roster, SiteId
from fedgrade.trust.ledger import Entry
from fedgrade.trust.records import Enrolled, Revoked, RoundClosed


@dataclass(frozen=True, kw_only=True)
class Members:
    """Who is enrolled and who was, and which of the latter one stage has counted since.

    One stage may: it had answered, the run was interrupted before the stage was written down, and was resumed after
    the revocation.
    """

    membership: Membership = field(default_factory=Membership)
    counted: frozenset[SiteId] = frozenset()

    def after(self, entry: Entry, *, where: str) -> "Members":
        """Who belongs once ``entry`` of the coordinator's ledger was written; ``where`` names it.

        Raises:
            LedgerBroken: it enrols or revokes whom it cannot, or counts a site that was revoked before it.
        """
        match entry.body:
            case Enrolled() | Revoked() as body:
                try:
                    return replace(self, membership=self.membership.after(body))
                except EnrolmentRefused as error:
                    raise LedgerBroken(f"{where}: {error}") from error
            case RoundClosed() as body:
                gone = self.membership.former.keys() & body.receipts.keys()
                if again := sorted(gone & self.counted):
                    raise LedgerBroken(f"{where}: counts {again[0]}, which was revoked before")
                return replace(self, counted=self.counted | gone)
            case _:
                return self


def with_former(roster: Roster, membership: Membership) -> Roster:
    """``roster`` with the keys of sites that were revoked, for what they signed before.

    Raises:
        LedgerBroken: the ledger enrolled a site of the roster with another key.
    """
    former = {site: body.key for site, body in membership.former.items()}
    enrolled = {**membership.keys, **former}
    for site, key in roster.sites.items():
        if enrolled.get(site, key) != key:
            raise LedgerBroken(
                f"site {site}: the coordinator's ledger enrolled key {enrolled[site].fingerprint}; the roster has "
                f"{key.fingerprint}"
            )
    return replace(roster, sites={**former, **roster.sites})
