"""What a node signs of every request that it makes of a coordinator's public listener, and how that is written down.

Flower's node authentication signs a time alone, so that a header caught behind a proxy opens the door for any request
for five minutes. Here the signature covers the method, the path, the body's hash, the session of the one process that
is asked, a nonce and the time. Knows neither HTTP nor Flower: doors carry the header.

Format, after :data:`DOMAIN`: one line a field, in the order of :class:`RequestClaim`, signed with ECDSA and SHA-384 by
the node's key (NIST curve, P-384 by default). No field can hold a line break, so that no two claims share bytes.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedgrade.errors import MessageRefused, SignatureRefused

DOMAIN: Final = b"fedgrade request 1\n"
HEADER: Final = "fedgrade-signature"
SESSION_HEADER: Final = "fedgrade-session"
# A node that has not been told the session signs for this one, is refused, and is told.
NO_SESSION: Final = "0" * 32
WINDOW_SECONDS: Final = 300  # that a node's clock may be off, either way
MAX_HEADER_CHARACTERS: Final = 512

_ALGORITHM: Final = ec.ECDSA(hashes.SHA384())
_METHOD: Final = re.compile(r"[A-Z]{1,16}")
_PATH: Final = re.compile(r"/[A-Za-z0-9._~/-]{0,255}")  # as it stands in the request; no query, nothing escaped
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")
_LATEST: Final = 10**17  # microseconds; the year 5138
_HEADER: Final = re.compile(
    r"1 ([0-9]{1,17}) ([0-9a-f]{32}) ([0-9a-f]{32}) ([0-9a-f]{64}) ([A-Za-z0-9+/]{8,200}={0,2})"
)


@dataclass(frozen=True, kw_only=True)
class RequestClaim:
    """What one request is.

    Attributes:
        method: of HTTP.
        path: as it stands in the request.
        body_digest: SHA-256 of the body, hexadecimal.
        session: what the SuperLink's process calls itself, 32 hexadecimal digits; another after each start.
        nonce: 32 hexadecimal digits, never used twice by a key.
        time: when it was signed, in microseconds since 1970 (UTC), by the node's clock.
    """

    method: str
    path: str
    body_digest: str
    session: str
    nonce: str
    time: int

    def __post_init__(self) -> None:
        for name, pattern, value in (
            ("method", _METHOD, self.method),
            ("path", _PATH, self.path),
            ("body_digest", _DIGEST, self.body_digest),
            ("session", _TOKEN, self.session),
            ("nonce", _TOKEN, self.nonce),
        ):
            if not pattern.fullmatch(value):
                raise MessageRefused(f"request signature: {name} {value[:80]!r} is none")
        if not 0 <= self.time < _LATEST:
            raise MessageRefused(f"request signature: time {str(self.time)[:20]} is none")

    @property
    def signed_bytes(self) -> bytes:
        """What the key signs."""
        fields = (self.method, self.path, self.body_digest, self.session, self.nonce, str(self.time))
        return DOMAIN + "\n".join(fields).encode("ascii")


@dataclass(frozen=True, kw_only=True)
class SignedClaim:
    """A claim, and a signature that :meth:`verify` has yet to hold against a key."""

    claim: RequestClaim
    signature: bytes

    def verify(self, key: ec.EllipticCurvePublicKey) -> None:
        """Return if ``key`` signed the claim.

        Raises:
            SignatureRefused: it did not.
        """
        try:
            key.verify(self.signature, self.claim.signed_bytes, _ALGORITHM)
        except InvalidSignature as error:
            raise SignatureRefused("request signature: is not this node key's over this request") from error


def is_session(text: str) -> bool:
    """Whether ``text`` could be a session's name."""
    return _TOKEN.fullmatch(text) is not None


def sign(claim: RequestClaim, key: ec.EllipticCurvePrivateKey) -> str:
    """The value of :data:`HEADER` by which ``key`` vouches for ``claim``."""
    signature = base64.b64encode(key.sign(claim.signed_bytes, _ALGORITHM)).decode("ascii")
    return f"1 {claim.time} {claim.session} {claim.nonce} {claim.body_digest} {signature}"


def read_header(value: str, *, method: str, path: str) -> SignedClaim:
    """What the header ``value`` says of a request to ``path``; nothing of it is verified yet.

    Raises:
        MessageRefused: it is none, or the method or path could not have been signed.
    """
    found = _HEADER.fullmatch(value) if len(value) <= MAX_HEADER_CHARACTERS else None
    if found is None:
        raise MessageRefused(f"request signature: header {HEADER} is malformed, or of another version of fedgrade")
    time, session, nonce, body_digest, signature = found.groups()
    try:
        raw = base64.b64decode(signature, validate=True)
    except binascii.Error as error:
        raise MessageRefused("request signature: not base64") from error
    if str(int(time)) != time or base64.b64encode(raw).decode("ascii") != signature:
        raise MessageRefused("request signature: time and signature have one spelling")
    claim = RequestClaim(
        method=method, path=path, body_digest=body_digest, session=session, nonce=nonce, time=int(time)
    )
    return SignedClaim(claim=claim, signature=raw)
