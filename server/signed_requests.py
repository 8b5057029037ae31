"""The public listener's inner door: nothing of a request's body is read before an enrolled node key vouched for it.

A stranger's request costs the reading of its header. Whoever holds an enrolled key can have as many requests answered
as :class:`Allowance` says. Nonces need to be remembered only for as long as the time of a request is let pass, and not
over a restart: a process that starts calls itself by another session, for which nothing was ever signed.
"""

import asyncio
import binascii
import hashlib
import json
import logging
import re
import secrets
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from fedgrade.errors import MessageRefused, SignatureRefused
from fedgrade.federation.pieces import FRAME_BYTES, PIECE_BYTES
from fedgrade.trust.request_signature import HEADER, SESSION_HEADER, WINDOW_SECONDS, SignedClaim, read_header
from server.connections import PLACE
from server.enrolled_keys import EnrolledKeys
from server.metrics import Application, Receive, Scope, Send
from server.node_identity import NODE_KEY

logger = logging.getLogger(__name__)

HEALTH: Final = "/health"
MAX_REQUEST_BYTES: Final = PIECE_BYTES + FRAME_BYTES
_KEY_HEADER: Final = FLEET_HTTP_PUBLIC_KEY_HEADER.encode()
_READ_ONCE: Final = frozenset({_KEY_HEADER, HEADER.encode(), b"content-length", b"transfer-encoding"})
_MAX_KEY_CHARACTERS: Final = 2048
_PASSED_OVER_BYTES: Final = 16 * 1024
_MAX_DIGITS: Final = 12  # Python refuses to read numbers of thousands
_SLOT_SECONDS: Final = 30
_TELL_AGAIN_SECONDS: Final = 60.0
_NUMBER: Final = re.compile(r"[0-9]+")
_KIND_CHARACTERS: Final = 24
_MICROSECONDS: Final = 10**6


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What one enrolled key may ask of the public listener.

    Attributes:
        requests: within the window, each of which is remembered.
        bytes_at_once: of bodies that are being read or answered.
        answers_at_once: that are made or sent. A node waits for three; what a connection that broke held may be there.
        stall_seconds: without a byte of a body, and it is given up.
        bytes_a_second: slower than this on the whole, and it is given up.
    """

    requests: int = 50_000
    bytes_at_once: int = 4 * MAX_REQUEST_BYTES
    answers_at_once: int = 4
    stall_seconds: float = 30.0
    bytes_a_second: int = 256 * 1024


class _Refused(Exception):
    """A request that is not passed on, and why; ``known`` if it came in the name of an enrolled key."""

    def __init__(self, status: int, reason: str, *, known: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.known = status, reason, known


@dataclass(kw_only=True)
class _Asker:
    """What is remembered of one key.

    Attributes:
        nonces: by the time that was signed with them, in slots.
        forgotten: seconds; of times before it nonces are no longer known.
        bytes_now: of bodies under way.
        answers_now: under way, each of which may be as long as an object.
    """

    nonces: dict[int, set[str]] = field(default_factory=dict)
    forgotten: int = 0
    bytes_now: int = 0
    answers_now: int = 0

    @contextmanager
    def answered(self, at_once: int, *, known: str) -> Iterator[None]:
        """While an answer is made and sent."""
        if self.answers_now >= at_once:
            raise _Refused(429, f"{at_once} answers to this node key are under way; read them", known=known)
        self.answers_now += 1
        try:
            yield
        finally:
            self.answers_now -= 1


class SignedRequests:
    """``application`` behind signatures; an ASGI application itself.

    Args:
        application: gets a request when all of it is there and its signature holds.
        keys: who is enrolled.
        clock: seconds since 1970 (UTC).
        allowance: for each key.
        on_known: called with the place of a connection, and the PEM of the enrolled key that signed what came over it.

    Attributes:
        session: what this process calls itself.
    """

    def __init__(
        self,
        application: Application,
        keys: EnrolledKeys,
        *,
        clock: Callable[[], float] = time.time,
        allowance: Allowance = Allowance(),
        on_known: Callable[[Any, bytes], None] = lambda _place, _key: None,
    ) -> None:
        self.session = secrets.token_hex(16)
        self._application = application
        self._keys = keys
        self._clock = clock
        self._allowance = allowance
        self._on_known = on_known
        self._askers: dict[bytes, _Asker] = {}
        self._told: dict[tuple[str, str], float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["path"] == HEALTH and scope["method"] in {"GET", "HEAD"}:
            # Answered here: whoever asks this often should not reach further.
            await _answer(send, 200, b'{"status":"ok"}')
            return
        try:
            headers = _headers(scope)
            signed, length, pem = _claimed(scope, headers)
            asker = await self._vouched(signed, length, pem)
            self._on_known(scope["state"].get(PLACE), pem)
            asker.bytes_now += length
            try:
                # Not under a name of its own: it would be kept until the answer has been sent.
                given = _given(await self._read(receive, length, signed.claim.body_digest), receive)
                scope["state"][NODE_KEY] = pem
                with asker.answered(self._allowance.answers_at_once, known=_name(pem)):
                    await self._application(scope, given, send)
            finally:
                asker.bytes_now -= length
        except _Refused as refused:
            self._tell(refused)
            await _refuse(scope, send, refused, session=self.session)

    async def _vouched(self, signed: SignedClaim, length: int, pem: bytes) -> _Asker:
        """Whoever signed, if it is enrolled and the request new."""
        key = await self._keys.find(pem)
        if key is None:
            self._askers.pop(pem, None)
            raise _Refused(401, "this node key is not enrolled here")
        claim, known = signed.claim, _name(pem)
        if claim.session != self.session:
            raise _Refused(401, "sign for this SuperLink's session, which began when it was started")
        now, asker = self._clock(), self._askers.setdefault(pem, _Asker())
        ahead = claim.time / _MICROSECONDS - now
        if abs(ahead) > WINDOW_SECONDS:
            raise _Refused(401, _clock_off(ahead, now), known=known)
        if length > self._allowance.bytes_at_once - asker.bytes_now:
            raise _Refused(
                429,
                f"{asker.bytes_now} bytes of this node key are under way; {length} more would exceed "
                f"{self._allowance.bytes_at_once}",
                known=known,
            )
        # Before the signature, which costs more: who repeats a request would have us check it again each time.
        used = self._unused(asker, claim.nonce, claim.time // _MICROSECONDS, now=now, known=known)
        try:
            signed.verify(key)
        except SignatureRefused as error:
            raise _Refused(401, str(error)) from error
        # Nothing was awaited since, so that no second request came between.
        used.add(claim.nonce)
        return asker

    def _unused(self, asker: _Asker, nonce: str, at: int, *, now: float, known: str) -> set[str]:
        """Where ``nonce`` is to be noted, for it was not used yet."""
        for slot in [slot for slot in asker.nonces if (slot + 1) * _SLOT_SECONDS < now - WINDOW_SECONDS]:
            del asker.nonces[slot]
            asker.forgotten = max(asker.forgotten, (slot + 1) * _SLOT_SECONDS)
        if at < asker.forgotten:
            raise _Refused(
                401, "this SuperLink's clock was set back; requests of that time may have been made before", known=known
            )
        used = asker.nonces.setdefault(at // _SLOT_SECONDS, set())
        if nonce in used:
            raise _Refused(401, "this very request was made before", known=known)
        if sum(map(len, asker.nonces.values())) >= self._allowance.requests:
            raise _Refused(
                429,
                f"over {self._allowance.requests} requests of this node key within {WINDOW_SECONDS} s; wait",
                known=known,
            )
        return used

    async def _read(self, receive: Receive, length: int, digest: str) -> bytes:
        """The body, whole and as it was signed."""
        parts: list[bytes] = []
        size, more, hashed = 0, True, hashlib.sha256()
        stall, now = self._allowance.stall_seconds, asyncio.get_running_loop().time
        end = now() + stall + length / self._allowance.bytes_a_second
        try:
            async with asyncio.timeout(stall) as patience:
                while more and size <= length:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _Refused(400, "the connection ended within the body")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    hashed.update(part)
                    parts.append(part)
                    patience.reschedule(min(end, now() + stall))
        except TimeoutError as error:
            raise _Refused(408, f"{size} of {length} bytes came in time") from error
        if size != length or hashed.hexdigest() != digest:
            raise _Refused(401, "request signature: the body is not the one that was signed")
        return b"".join(parts)

    def _tell(self, refused: _Refused) -> None:
        """One line a minute, key and kind. Strangers are only counted: their lines could fill the disk."""
        # Without its numbers a reason is one of a handful.
        now, kind = self._clock(), (refused.known, _NUMBER.sub("", refused.reason)[:_KIND_CHARACTERS])
        if refused.known and abs(now - self._told.get(kind, 0.0)) > _TELL_AGAIN_SECONDS:
            self._told[kind] = now
            logger.warning("node key %s: request refused: %s", refused.known, refused.reason)


def declared_length(value: bytes) -> int | None:
    """The length of a body by its header, if it is one that is read."""
    length = int(value) if value.isdigit() and len(value) <= _MAX_DIGITS else MAX_REQUEST_BYTES + 1
    return length if length <= MAX_REQUEST_BYTES else None


def _name(pem: bytes) -> str:
    return hashlib.sha256(pem).hexdigest()[:16]


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """The headers that decide, each of which must stand there once: who reads the first must not differ from us."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in _READ_ONCE:
            if name in found:
                raise _Refused(400, f"header {name.decode()}: stands there twice")
            found[name] = value
    return found


def _claimed(scope: Scope, headers: dict[bytes, bytes]) -> tuple[SignedClaim, int, bytes]:
    """What the request claims to be, how long its body is, and the PEM of whose key is said to vouch for that."""
    length = declared_length(headers.get(b"content-length", b""))
    if length is None or b"transfer-encoding" in headers:
        raise _Refused(413, f"a body of declared length is required, at most {MAX_REQUEST_BYTES} bytes")
    given, key = headers.get(HEADER.encode()), headers.get(_KEY_HEADER, b"")
    if given is None or not 0 < len(key) <= _MAX_KEY_CHARACTERS:
        raise _Refused(401, f"header {HEADER} is missing: every request is signed; an older fedgrade signs none")
    try:
        # Signed is the path as it was sent, and the application goes by the path as it was decoded.
        path = (scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")).decode("ascii")
        signed = read_header(given.decode("ascii"), method=scope["method"], path=path)
        return signed, length, b64decode(key, validate=True)
    except (MessageRefused, UnicodeDecodeError, binascii.Error) as error:
        raise _Refused(400, str(error) if isinstance(error, MessageRefused) else "headers: not plain text") from error


def _clock_off(ahead: float, now: float) -> str:
    here = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    return (
        f"this request was signed {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's clock, "
        f"which says {here}; at most {WINDOW_SECONDS} s are let pass: set the clock that is wrong"
    )


def _given(body: bytes, receive: Receive) -> Receive:
    """``receive`` for an application that has not been given ``body`` yet."""
    waiting = [body]

    async def give() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return give


async def _refuse(scope: Scope, send: Send, refused: _Refused, *, session: str) -> None:
    # In the form in which flwr's clients read what went wrong.
    said = json.dumps({"code": 0, "detail": refused.reason}).encode()
    headers = [(SESSION_HEADER.encode(), session.encode())]
    length = declared_length(dict(scope["headers"]).get(b"content-length", b""))
    # A small body that nobody wants is cheaper to pass over than a new connection would be.
    if length is None or length > _PASSED_OVER_BYTES:
        headers.append((b"connection", b"close"))
    await _answer(send, refused.status, said, *headers)


async def _answer(send: Send, status: int, said: bytes, *headers: tuple[bytes, bytes]) -> None:
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(said)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": said})
