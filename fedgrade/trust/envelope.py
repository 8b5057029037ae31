"""DSSE envelopes: a signature over exact bytes, so that nothing depends on how a document is spelt.

Specification: https://github.com/secure-systems-lab/dsse (protocol v1.0.2, PAE encoding), Ed25519 signatures.
Unverified bytes have type ``bytes``; what :func:`open_sealed` returns was signed by the key that was named.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import TypeVar

from fedgrade.errors import DocumentRefused, SignatureRefused
from fedgrade.trust.canonical import MAX_DOCUMENT_BYTES, decode, encode
from fedgrade.trust.identity import PublicKey, SigningKey

T = TypeVar("T")

_TYPE_PREFIX = "application/vnd.fedgrade."
_SIGNATURE_LETTERS = 88  # of base64, for the 64 bytes of an Ed25519 signature


@dataclass(frozen=True, kw_only=True)
class _Signature:
    keyid: str
    sig: str


@dataclass(frozen=True, kw_only=True)
class _Envelope:
    payload: str
    payloadType: str  # noqa: N815 - DSSE's own spelling
    signatures: tuple[_Signature, ...]


def payload_type(of: type[object]) -> str:
    """The media type under which documents of class ``of`` are signed; no document passes for another kind."""
    return f"{_TYPE_PREFIX}{of.__name__.lower()}+json"


def seal(document: object, key: SigningKey) -> bytes:
    """The DSSE envelope around ``document``'s canonical bytes, signed by ``key``."""
    payload = encode(document)
    kind = payload_type(type(document))
    signature = key.sign(pre_authentication_encoding(kind, payload))
    envelope = _Envelope(
        payload=base64.b64encode(payload).decode(),
        payloadType=kind,
        signatures=(_Signature(keyid=key.public.key_id, sig=base64.b64encode(signature).decode()),),
    )
    return encode(envelope)


def open_sealed(
    raw: bytes, *, as_: type[T], signed_by: PublicKey, what: str = "", limit: int = MAX_DOCUMENT_BYTES
) -> T:
    """The document inside ``raw``, signed by ``signed_by`` as a ``T``. The signature is checked before it is parsed.

    Raises:
        DocumentRefused: not an envelope, of another kind, or the document inside is malformed.
        SignatureRefused: signed by nobody, by someone else, or altered since.
    """
    name, kind = what or as_.__name__, payload_type(as_)
    found = _as_sealed(raw, kind=kind, key=signed_by, limit=limit)
    payload, signature = found or _as_spelt(raw, kind=kind, key=signed_by, name=name, limit=limit)
    signed_by.verify(signature, pre_authentication_encoding(kind, payload))
    return decode(as_, payload, what=name, limit=limit)


def pre_authentication_encoding(kind: str, payload: bytes) -> bytes:
    """What DSSE signs: ``"DSSEv1" SP len(type) SP type SP len(payload) SP payload``, lengths in decimal bytes."""
    media_type = kind.encode()
    return b"DSSEv1 %d %s %d %s" % (len(media_type), media_type, len(payload), payload)


def _as_sealed(raw: bytes, *, kind: str, key: PublicKey, limit: int) -> tuple[bytes, bytes] | None:
    """Payload and signature of an envelope spelt byte for byte as :func:`seal` spells it; nothing for any other.

    Such bytes need no JSON parser: what stands between the fixed parts is base64 in its one form, hence without quotes.
    """
    before, after = b'{"payload":"', b'"}]}'
    between = f'","payloadType":"{kind}","signatures":[{{"keyid":"{key.key_id}","sig":"'.encode()
    signature_at = len(raw) - len(after) - _SIGNATURE_LETTERS
    payload_end = signature_at - len(between)
    if not (
        len(before) <= payload_end
        and len(raw) <= limit
        and raw.startswith(before)
        and raw.startswith(between, payload_end)
        and raw.endswith(after)
    ):
        return None
    try:
        payload = _from_base64(raw[len(before) : payload_end], name=kind)
        signature = _from_base64(raw[signature_at : signature_at + _SIGNATURE_LETTERS], name=kind)
    except DocumentRefused:
        return None
    return payload, signature


def _as_spelt(raw: bytes, *, kind: str, key: PublicKey, name: str, limit: int) -> tuple[bytes, bytes]:
    """Payload and signature of an envelope in any strict JSON."""
    envelope = decode(_Envelope, raw, what=f"{name} envelope", limit=limit)
    if envelope.payloadType != kind:
        raise DocumentRefused(f"{name}: payload type {envelope.payloadType[:80]!r}; expected {kind!r}")
    if len(envelope.signatures) != 1:
        raise SignatureRefused(f"{name}: {len(envelope.signatures)} signatures; exactly one is expected")
    (signature,) = envelope.signatures
    if signature.keyid != key.key_id:
        raise SignatureRefused(f"{name}: signed by key {signature.keyid[:16]!r}; expected {key.key_id[:16]!r}")
    return _from_base64(envelope.payload, name=name), _from_base64(signature.sig, name=name)


def _from_base64(text: str | bytes, *, name: str) -> bytes:
    try:
        letters = text.encode("ascii") if isinstance(text, str) else text
        raw = binascii.a2b_base64(letters, strict_mode=True)
    except ValueError as error:
        raise DocumentRefused(f"{name}: not base64") from error
    # Unused low bits and missing padding would let two spellings carry one payload.
    if binascii.b2a_base64(raw, newline=False) != letters:
        raise DocumentRefused(f"{name}: base64 is not in its one canonical form")
    return raw
