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
    name = what or as_.__name__
    envelope = decode(_Envelope, raw, what=f"{name} envelope", limit=limit)
    if envelope.payloadType != payload_type(as_):
        raise DocumentRefused(f"{name}: payload type {envelope.payloadType[:80]!r}; expected {payload_type(as_)!r}")
    if len(envelope.signatures) != 1:
        raise SignatureRefused(f"{name}: {len(envelope.signatures)} signatures; exactly one is expected")
    (signature,) = envelope.signatures
    if signature.keyid != signed_by.key_id:
        raise SignatureRefused(f"{name}: signed by key {signature.keyid[:16]!r}; expected {signed_by.key_id[:16]!r}")
    payload = _from_base64(envelope.payload, name=name)
    signed_by.verify(_from_base64(signature.sig, name=name), pre_authentication_encoding(envelope.payloadType, payload))
    return decode(as_, payload, what=name, limit=limit)


def pre_authentication_encoding(kind: str, payload: bytes) -> bytes:
    """What DSSE signs: ``"DSSEv1" SP len(type) SP type SP len(payload) SP payload``, lengths in decimal bytes."""
    media_type = kind.encode()
    return b"DSSEv1 %d %s %d %s" % (len(media_type), media_type, len(payload), payload)


def _from_base64(text: str, *, name: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DocumentRefused(f"{name}: not base64") from error
    # Unused low bits and missing padding would let two spellings carry one payload.
    if base64.b64encode(raw).decode() != text:
        raise DocumentRefused(f"{name}: base64 is not in its one canonical form")
    return raw
