"""The coordinator's private authority, the SuperLink's certificate, and node keys in the form that Flower takes.

TLS names the server only; a node proves itself by signing each request with its node key. Existing private keys are
kept, whatever is asked; a certificate is public and is renewed when it no longer covers what it must.
"""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgrade.errors import DocumentRefused
from server.private_files import create_private, read_private

LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost")
_AUTHORITY_LIFE: Final = timedelta(days=3650)
_SERVER_LIFE: Final = timedelta(days=397)  # the longest that TLS clients commonly accept
_RENEW_BEFORE: Final = timedelta(days=30)
_CLOCK_SLACK: Final = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class ServerCertificates:
    """Where the SuperLink's TLS files lie.

    Attributes:
        authority: certificate of the private authority; partners need a copy and nothing else. While one authority
            takes over from another, both, and first the one that signs.
        certificate: the SuperLink's certificate, signed by the authority.
        key: the SuperLink's private key, mode 0600.
    """

    authority: Path
    certificate: Path
    key: Path


def certify(folder: Path, hosts: Sequence[str], *, now: datetime) -> ServerCertificates:
    """A SuperLink certificate for ``hosts`` and loopback in ``folder``, by an authority that also lives there.

    Names that the certificate had before stay in it: whoever goes by an older address still finds the SuperLink.

    Args:
        folder: holds ``ca.pem``, ``ca.key``, ``server.pem`` and ``server.key``; created with mode 0700.
        hosts: public names and addresses at which partners will reach the SuperLink.
        now: UTC.

    Raises:
        DocumentRefused: a key file exists and cannot be used, or a host is neither a name nor an address.
    """
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *LOOPBACK_HOSTS])]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = ServerCertificates(
        authority=folder / "ca.pem", certificate=folder / "server.pem", key=folder / "server.key"
    )
    authorities, authority_key = _standing_authorities(folder, now=now)
    server_key = _ensure_key(paths.key)
    if not _still_good(paths.certificate, server_key, names, issuer=authorities[0], now=now):
        names = list(dict.fromkeys([*names, *_names_of(paths.certificate)]))
        _replace(paths.certificate, _server(server_key, authority_key, names, issuer=authorities[0], now=now))
    return paths


def read_authorities(folder: Path) -> list[x509.Certificate]:
    """The authorities in ``folder``: first the one that signs, then those that partners trust besides; none, or some.

    Raises:
        DocumentRefused: the file holds something else.
    """
    path = folder / "ca.pem"
    if not path.exists():
        return []
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except ValueError as error:
        raise DocumentRefused(f"{path}: no certificates in PEM form; restore it from your backup") from error


def write_authorities(folder: Path, authorities: Sequence[x509.Certificate]) -> None:
    """``ca.pem`` in ``folder`` holds ``authorities``, in this order."""
    pem = [one.public_bytes(serialization.Encoding.PEM) for one in authorities]
    _replace(folder / "ca.pem", b"".join(pem))


def new_authority(key_file: Path, *, name: str, now: datetime) -> x509.Certificate:
    """A certificate for the authority whose key is in ``key_file``, which is made if it does not exist."""
    return _authority(_ensure_key(key_file), _name(name), now=now)


def authority_key_file(folder: Path, authority: x509.Certificate) -> Path:
    """Where in ``folder`` the private key of ``authority`` is.

    Raises:
        DocumentRefused: nowhere.
    """
    for path in sorted(folder.glob("ca*.key")):
        if _ensure_key(path).public_key() == authority.public_key():
            return path
    raise DocumentRefused(
        f"{folder}: none of its ca*.key belongs to an authority in ca.pem; restore it from your backup"
    )


def _standing_authorities(folder: Path, *, now: datetime) -> tuple[list[x509.Certificate], ec.EllipticCurvePrivateKey]:
    """The authorities, of which the first is good for another month, and the key of that one."""
    authorities = read_authorities(folder)
    if authorities:
        key = _ensure_key(authority_key_file(folder, authorities[0]))
        first = authorities[0]
        if first.not_valid_after_utc <= now + _RENEW_BEFORE:
            first = _authority(key, first.subject, now=now)
        current = [first, *(one for one in authorities[1:] if one.not_valid_after_utc > now)]
    else:
        keys = sorted(folder.glob("ca*.key"))
        if len(keys) > 1:
            raise DocumentRefused(
                f"{folder}: ca.pem is gone, and there are several ca*.key; restore it from your backup"
            )
        path = keys[0] if keys else folder / "ca.key"
        key = _ensure_key(path)
        current = [new_authority(path, name="fedgrade authority", now=now)]
    if current != authorities:
        write_authorities(folder, current)
    return current, key


def create_node_key(path: Path) -> Path:
    """A new EC P-384 key at ``path`` in OpenSSH form (mode 0600); the path of its public half, ``path`` + ``.pub``.

    Raises:
        DocumentRefused: ``path`` exists; an enrolled key is never overwritten.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    create_private(
        path,
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
    )
    public = path.with_name(path.name + ".pub")
    _replace(
        public,
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n",
    )
    return public


def fingerprint(certificate: Path) -> str:
    """The first 128 bits of the SHA-256 of a PEM certificate, in groups of four digits, as people compare it."""
    digits = x509.load_pem_x509_certificate(certificate.read_bytes()).fingerprint(hashes.SHA256()).hex()[:32]
    return " ".join(digits[at : at + 4] for at in range(0, len(digits), 4))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("ascii").decode() if host else _no_host(host))
    except UnicodeEncodeError as error:
        raise DocumentRefused(f"host {host!r}: write international names in their ASCII form (xn--...)") from error


def _no_host(host: str) -> str:
    raise DocumentRefused(f"host {host!r}: neither a name nor an address")


def _ensure_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        create_private(
            path,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
    try:
        loaded = serialization.load_pem_private_key(read_private(path), None)
    except (ValueError, TypeError) as error:
        raise DocumentRefused(f"{path}: not an unencrypted PEM private key; restore it from your backup") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise DocumentRefused(f"{path}: an elliptic-curve key expected, got {type(loaded).__name__}")
    return loaded


def _still_good(
    path: Path,
    key: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
    *,
    issuer: x509.Certificate,
    now: datetime,
) -> bool:
    """Whether ``path`` certifies ``key``, by ``issuer``, for all of ``names`` for another month."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.verify_directly_issued_by(issuer)
    except (OSError, ValueError, TypeError, InvalidSignature):
        return False
    return (
        certificate.public_key() == key.public_key()
        and certificate.not_valid_after_utc > now + _RENEW_BEFORE
        and set(_names_of(path)).issuperset(names)
    )


def _names_of(path: Path) -> list[x509.GeneralName]:
    """What the certificate at ``path`` is for; nothing where there is none."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (OSError, ValueError, x509.ExtensionNotFound):
        return []


def _authority(key: ec.EllipticCurvePrivateKey, name: x509.Name, *, now: datetime) -> x509.Certificate:
    builder = (
        _builder(name, name, key.public_key(), now=now, life=_AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA384())


def _server(
    key: ec.EllipticCurvePrivateKey,
    authority_key: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
    *,
    issuer: x509.Certificate,
    now: datetime,
) -> bytes:
    builder = (
        _builder(_name("superlink"), issuer.subject, key.public_key(), now=now, life=_SERVER_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    return builder.sign(authority_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # Partners' clocks are not ours.
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + life)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _replace(path: Path, content: bytes) -> None:
    """``path`` holds ``content`` or what it held before, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)
