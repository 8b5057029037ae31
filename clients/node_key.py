"""The partner's Flower node key: EC P-384 in OpenSSH form, made and kept at the site.

It proves to the SuperLink which connection is whose and nothing else; what a site says is signed with its own Ed25519
key, of which this file knows nothing. P-384 because Flower refuses Ed25519.
"""

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedgrade.errors import DocumentRefused

_OTHERS = 0o077
_MAX_KEY_BYTES = 16 * 1024


def create_node_key(path: Path) -> Path:
    """A new private key at ``path`` (mode 0600) and its public half at ``path`` + ``.pub``, which is returned.

    Raises:
        DocumentRefused: ``path`` exists; an enrolled key is never overwritten.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise DocumentRefused(f"node key {path}: exists and is not overwritten; name another file") from error
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(private)
    return _write_public(path, key)


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key at ``path``.

    Raises:
        DocumentRefused: it is missing, readable by others, or not an unencrypted elliptic-curve key in OpenSSH form.
    """
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_mode & _OTHERS:
                raise DocumentRefused(f"node key {path}: readable by others; run chmod 600 {path}")
            raw = stream.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise DocumentRefused(f"node key {path}: {error.strerror}; create one or correct the path") from error
    try:
        key = serialization.load_ssh_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DocumentRefused(f"node key {path}: not an unencrypted OpenSSH private key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DocumentRefused(
            f"node key {path}: Flower takes NIST elliptic curves only; use ssh-keygen -t ecdsa -b 384"
        )
    return key


def next_node_key(path: Path) -> Path:
    """Where a new key waits until the coordinator has enrolled it in place of the one at ``path``."""
    return path.with_name(path.name + ".next")


def promote_node_key(path: Path) -> None:
    """The key that waited is the one at ``path`` from here on; what was there opens no door any more.

    Interrupted halfway, it is done again when the node signs on again.
    """
    waiting = next_node_key(path)
    public = waiting.with_name(waiting.name + ".pub")
    if public.exists():
        public.replace(path.with_name(path.name + ".pub"))
    waiting.replace(path)
    # What the node noted of its first session with it.
    waiting.with_name(waiting.name + ".session").unlink(missing_ok=True)


def _write_public(path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    public = path.with_name(path.name + ".pub")
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"
    )
    return public
