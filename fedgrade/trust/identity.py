"""Who is who: Ed25519 keys, and the roster that says which key speaks for which site.

Knows nothing of what is signed. Flower's own node keys (EC P-384) are transport and live in the doors.
"""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NewType

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedgrade.errors import DocumentRefused, SignatureRefused
from fedgrade.trust.canonical import decode, digest

SiteId = NewType("SiteId", str)

_SITE_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")
_OWNER_ONLY = 0o077
_FINGERPRINT_DIGITS = 32
_FINGERPRINT = re.compile(rf"[0-9a-f]{{{_FINGERPRINT_DIGITS}}}|[0-9a-f]{{64}}")
_SEPARATORS = re.compile(r"[\s:-]")


def site_id(text: str) -> SiteId:
    """``text`` as a site's name: lower-case letters, digits and inner hyphens, at most 63 (RFC 1123 label).

    Raises:
        DocumentRefused: it is not such a name.
    """
    if not _SITE_ID.fullmatch(text):
        raise DocumentRefused(f"site {text[:80]!r}: a name is 1 to 63 of a-z, 0-9 and inner hyphens")
    return SiteId(text)


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """An Ed25519 public key (RFC 8032), as 64 hexadecimal digits."""

    hexadecimal: str

    def __post_init__(self) -> None:
        if not _PUBLIC_KEY.fullmatch(self.hexadecimal):
            raise DocumentRefused(f"public key {self.hexadecimal[:80]!r}: 64 lower-case hexadecimal digits expected")

    @property
    def key_id(self) -> str:
        """SHA-256 of the raw key: what an envelope names its signer by."""
        return _key_id(self.hexadecimal)

    @property
    def fingerprint(self) -> str:
        """What two people read to each other: the first 128 bits of the key's SHA-256, in groups of four digits.

        Enough, because a swindler must find another key for a print that is given, not two keys that share one.
        """
        return " ".join(self.key_id[at : at + 4] for at in range(0, _FINGERPRINT_DIGITS, 4))

    def has_fingerprint(self, text: str) -> bool:
        """Whether ``text`` is this key's fingerprint, or all of its :attr:`key_id`, however it was spaced."""
        return _SEPARATORS.sub("", text).lower() in {self.key_id[:_FINGERPRINT_DIGITS], self.key_id}

    @staticmethod
    def is_fingerprint(text: str) -> bool:
        """Whether ``text`` could be some key's fingerprint or whole digest, however it was spaced."""
        return _FINGERPRINT.fullmatch(_SEPARATORS.sub("", text).lower()) is not None

    def verify(self, signature: bytes, message: bytes) -> None:
        """Return if ``signature`` is this key's over ``message``.

        Raises:
            SignatureRefused: it is not.
        """
        try:
            _loaded(self.hexadecimal).verify(signature, message)
        except InvalidSignature as error:
            raise SignatureRefused(f"signature does not match key {self.hexadecimal[:16]}…") from error


# A ledger asks for the same key a hundred thousand times. Bounded, because key texts may come from anyone.
@lru_cache(maxsize=1024)
def _loaded(hexadecimal: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(hexadecimal))


@lru_cache(maxsize=1024)
def _key_id(hexadecimal: str) -> str:
    return digest(bytes.fromhex(hexadecimal))


class SigningKey:
    """An Ed25519 private key; prints as its public half only."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        raw = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.public = PublicKey(hexadecimal=raw.hex())

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hexadecimal[:16]}…)"

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature over ``message``."""
        return self._private.sign(message)

    def save(self, path: Path) -> None:
        """Write the key to a new file that only its owner can read (PKCS #8 PEM).

        Raises:
            DocumentRefused: the file exists (a key is never overwritten) or cannot be written; no half a key is left.
        """
        pem = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise DocumentRefused(f"key {path}: exists already; a key is never overwritten") from error
        except OSError as error:
            raise DocumentRefused(f"key {path}: cannot be written ({error.strerror})") from error
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            path.unlink()
            raise DocumentRefused(f"key {path}: cannot be written ({error.strerror})") from error

    @classmethod
    def load(cls, path: Path) -> "SigningKey":
        """The key in ``path``.

        Raises:
            DocumentRefused: no such file, others can read it, or it holds no Ed25519 key.
        """
        try:
            if path.stat().st_mode & _OWNER_ONLY:
                raise DocumentRefused(f"key {path}: others can read it; run chmod 600 on it")
            private = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise DocumentRefused(f"key {path}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            # A TypeError is how cryptography says that the file wants a passphrase.
            raise DocumentRefused(f"key {path}: not an unencrypted PEM private key") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise DocumentRefused(f"key {path}: an Ed25519 key is needed, found {type(private).__name__}")
        return cls(private)


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Whose key is whose: the coordinator and every accredited site. Everyone holds a copy they trust."""

    coordinator: PublicKey
    sites: dict[SiteId, PublicKey]

    def __post_init__(self) -> None:
        for name in self.sites:
            site_id(name)
        keys = [self.coordinator.hexadecimal, *(key.hexadecimal for key in self.sites.values())]
        if len(set(keys)) != len(keys):
            raise DocumentRefused("roster: one key stands for two identities; each identity has its own")

    def key_of(self, site: SiteId) -> PublicKey:
        """The key that speaks for ``site``.

        Raises:
            SignatureRefused: the roster does not know the site.
        """
        try:
            return self.sites[site]
        except KeyError as error:
            raise SignatureRefused(f"site {site!r} is not on the roster; enrol it first") from error


def read_roster(path: Path) -> Roster:
    """The roster in the JSON file ``path``.

    Raises:
        DocumentRefused: unreadable or malformed.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DocumentRefused(f"roster {path}: cannot be read ({error.strerror})") from error
    return decode(Roster, raw, what=f"roster {path}")
