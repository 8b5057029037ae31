"""How strangers get to know each other, and part: a partner's join request and leave notice, a coordinator's bundle.

Each paper is signed by the key that it names. That proves that whoever wrote them holds the key, and nothing about
who that is: two people compare :attr:`~fedgrade.trust.identity.PublicKey.fingerprint` over another channel.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final, Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedgrade.errors import DocumentRefused, FedgradeError, SignatureRefused
from fedgrade.trust.canonical import decode, digest, encode
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import PublicKey, Roster, SigningKey, SiteId, site_id
from fedgrade.trust.records import COORDINATOR, UTC_TIME, Enrolled, Revoked

T = TypeVar("T")

MAX_PAPER_BYTES: Final = 2**20
MAX_DECLARED_ITEMS: Final = 10**9
_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9a-fA-F:]{2,45}\]):([0-9]{1,5})")
_MAX_PORT: Final = 65535
_MAX_AUTHORITIES: Final = 2
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class EnrolmentRefused(FedgradeError):
    """A site cannot be enrolled or revoked as asked: its name or key is taken, was revoked, or was never here."""


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """What a partner asks to be put on the roster with; all of it public.

    Attributes:
        schema: of this document.
        site: the name it wants, for life.
        key: the key that speaks for it, and that signs this request.
        node_key: the public key of its connection, OpenSSH form, NIST curve.
        declared_items: what it chooses to publish of its size.
        made: when, by the partner's clock (UTC); a newer request replaces an older one by the same key.
    """

    schema: Literal["fedgrade/join-request/1"] = "fedgrade/join-request/1"
    site: SiteId
    key: PublicKey
    node_key: str
    declared_items: int
    made: str

    def __post_init__(self) -> None:
        site_id(self.site)
        if self.site == COORDINATOR:
            raise DocumentRefused(f"join request: the name {COORDINATOR!r} is the coordinator's own; choose another")
        if not 1 <= self.declared_items <= MAX_DECLARED_ITEMS:
            raise DocumentRefused(
                f"join request: declared_items {str(self.declared_items)[:20]} must be at least 1 and at most "
                f"{MAX_DECLARED_ITEMS}"
            )
        _require_time(self.made, what="join request: made")
        _require_node_key(self.node_key)
        # As it will stand in the coordinator's ledger.
        self.record  # noqa: B018 - its own checks are the point

    @property
    def record(self) -> Enrolled:
        """What a ledger says once the request was granted."""
        return Enrolled(site=self.site, key=self.key, node_key=self.node_key, declared_items=self.declared_items)


@dataclass(frozen=True, kw_only=True)
class JoinBundle:
    """What a coordinator gives to all its partners; all of it public.

    Attributes:
        schema: of this document.
        sequence: grows with each bundle; an older one is never taken again.
        issued: when, by the coordinator's clock (UTC).
        address: ``host:port`` at which nodes reach the coordinator.
        authority: PEM certificate of its private authority; of both, while one takes over from another.
        roster: who is who; its coordinator's key signs this bundle.
    """

    schema: Literal["fedgrade/join-bundle/1"] = "fedgrade/join-bundle/1"
    sequence: int
    issued: str
    address: str
    authority: str
    roster: Roster

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise DocumentRefused(f"bundle: sequence {self.sequence} must be at least 1")
        _require_time(self.issued, what="bundle: issued")
        found = _ADDRESS.fullmatch(self.address)
        if found is None or not 1 <= int(found[1]) <= _MAX_PORT:
            raise DocumentRefused(f"bundle: address {self.address[:80]!r}: host:port expected")
        try:
            authorities = x509.load_pem_x509_certificates(self.authority.encode())
        except ValueError as error:
            raise DocumentRefused("bundle: authority is no certificate in PEM form") from error
        if len(authorities) > _MAX_AUTHORITIES:
            raise DocumentRefused(f"bundle: {len(authorities)} authorities; at most {_MAX_AUTHORITIES} at a time")


@dataclass(frozen=True, kw_only=True)
class LeaveNotice:
    """What a partner says when it leaves; all of it public.

    Attributes:
        schema: of this document.
        site: who leaves.
        key: the key that speaks for it, and that signs this notice.
        roster: SHA-256 of the roster that it held, in its canonical form: whom it leaves, and that it knew them.
        made: when, by the partner's clock (UTC); a join request that is newer takes it back.
    """

    schema: Literal["fedgrade/leave-notice/1"] = "fedgrade/leave-notice/1"
    site: SiteId
    key: PublicKey
    roster: str
    made: str

    def __post_init__(self) -> None:
        site_id(self.site)
        if not _SHA256.fullmatch(self.roster):
            raise DocumentRefused(f"leave notice: roster {self.roster[:80]!r} is no SHA-256")
        _require_time(self.made, what="leave notice: made")


@dataclass(frozen=True, kw_only=True)
class _Paper:
    """A document beside the key that is said to have signed it."""

    key: PublicKey
    sealed: str


def write_request(request: JoinRequest, key: SigningKey) -> bytes:
    """``request`` signed by the key that it names."""
    return _write(request, key, named=request.key)


def read_request(raw: bytes, *, what: str = "join request") -> JoinRequest:
    """The request in ``raw``, signed by the key that it names.

    Raises:
        DocumentRefused, SignatureRefused: it is no such request, or was altered.
    """
    return _read(raw, as_=JoinRequest, named=lambda request: request.key, what=what)


def write_notice(notice: LeaveNotice, key: SigningKey) -> bytes:
    """``notice`` signed by the key that it names."""
    return _write(notice, key, named=notice.key)


def read_notice(raw: bytes, *, what: str = "leave notice") -> LeaveNotice:
    """The notice in ``raw``, signed by the key that it names.

    Raises:
        DocumentRefused, SignatureRefused: it is no such notice, or was altered.
    """
    return _read(raw, as_=LeaveNotice, named=lambda notice: notice.key, what=what)


def write_bundle(bundle: JoinBundle, key: SigningKey) -> bytes:
    """``bundle`` signed by the coordinator that its roster names."""
    return _write(bundle, key, named=bundle.roster.coordinator)


def read_bundle(raw: bytes, *, what: str = "bundle") -> JoinBundle:
    """The bundle in ``raw``, signed by the coordinator that its roster names.

    Raises:
        DocumentRefused, SignatureRefused: it is no such bundle, or was altered.
    """
    return _read(raw, as_=JoinBundle, named=lambda bundle: bundle.roster.coordinator, what=what)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Who is enrolled, and who was: the fold over a coordinator's records, in their order."""

    current: dict[SiteId, Enrolled] = field(default_factory=dict)
    former: dict[SiteId, Revoked] = field(default_factory=dict)

    @classmethod
    def of(cls, bodies: Iterable[Enrolled | Revoked]) -> "Membership":
        """Who belongs after all of ``bodies``.

        Raises:
            EnrolmentRefused: one does not follow from those before it.
        """
        membership = cls()
        for body in bodies:
            membership = membership.after(body)
        return membership

    def after(self, body: Enrolled | Revoked) -> "Membership":
        """Who belongs once ``body`` happened.

        Raises:
            EnrolmentRefused: it cannot: a name or key is taken or was revoked, or the site was not here.
        """
        if isinstance(body, Revoked):
            standing = self.current.get(body.site)
            if standing is None or standing.key != body.key:
                raise EnrolmentRefused(f"site {body.site}: is not enrolled with that key, so it cannot be revoked")
            rest = {site: enrolled for site, enrolled in self.current.items() if site != body.site}
            return replace(self, current=rest, former={**self.former, body.site: body})
        self._require_free(body)
        return replace(self, current={**self.current, body.site: body})

    @property
    def keys(self) -> dict[SiteId, PublicKey]:
        """Who speaks for whom now: the sites of a roster."""
        return {site: enrolled.key for site, enrolled in sorted(self.current.items())}

    def _require_free(self, body: Enrolled) -> None:
        standing = self.current.get(body.site)
        if standing is not None and standing.key != body.key:
            raise EnrolmentRefused(
                f"site {body.site}: is enrolled with another key ({standing.key.fingerprint}); a name keeps its key "
                "for life, because its ledger is signed with it; choose another name"
            )
        if body.site in self.former or any(body.key == gone.key for gone in self.former.values()):
            raise EnrolmentRefused(
                f"site {body.site}: this name or key was revoked, for good; make new keys under a new name"
            )
        for site, other in self.current.items():
            if site != body.site and (other.key == body.key or other.node_key == body.node_key):
                raise EnrolmentRefused(
                    f"site {body.site}: one of its keys is enrolled as {site}; each site has its own"
                )


def roster_digest(roster: Roster) -> str:
    """By which a leave notice names ``roster``."""
    return digest(encode(roster))


def utc_text(now: datetime) -> str:
    """``now`` as ledgers and papers write it."""
    return now.astimezone(UTC).isoformat(timespec="microseconds")


def _write(document: JoinRequest | JoinBundle | LeaveNotice, key: SigningKey, *, named: PublicKey) -> bytes:
    if key.public != named:
        raise SignatureRefused(f"key {key.public.fingerprint}: does not sign for {named.fingerprint}")
    return encode(_Paper(key=key.public, sealed=seal(document, key).decode())) + b"\n"


def _read(raw: bytes, *, as_: type[T], named: Callable[[T], PublicKey], what: str) -> T:
    paper = decode(_Paper, raw, what=what, limit=MAX_PAPER_BYTES)
    try:
        document = open_sealed(paper.sealed.encode(), as_=as_, signed_by=paper.key, what=what, limit=MAX_PAPER_BYTES)
    except SignatureRefused as error:
        raise SignatureRefused(f"{what}: was altered, or is not by whom it names ({error})") from error
    if named(document) != paper.key:
        raise SignatureRefused(f"{what}: is signed by {paper.key.fingerprint}, and names {named(document).fingerprint}")
    return document


def _require_time(text: str, *, what: str) -> None:
    if not UTC_TIME.fullmatch(text):
        raise DocumentRefused(f"{what} {text[:80]!r}: a time such as 2026-07-01T12:00:00.000000+00:00 is expected")


def _require_node_key(text: str) -> None:
    """``text`` is one elliptic-curve key in its one spelling: no comment, no second line."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DocumentRefused(f"node key {text[:80]!r}: not an OpenSSH public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DocumentRefused("node key: Flower takes NIST elliptic curves only")
    spelt = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    if spelt != text:
        raise DocumentRefused(f"node key {text[:80]!r}: write it without a comment or blanks")
