"""Secrets on the coordinator's disk: created once with mode 0600, read only if no one else could have read them."""

import os
import secrets
from pathlib import Path
from typing import Final

from fedgrade.errors import DocumentRefused

_OTHERS: Final = 0o077
_MAX_SECRET_BYTES: Final = 64 * 1024


def create_private(path: Path, content: bytes) -> None:
    """``path`` holds ``content``, readable by its owner alone.

    Raises:
        DocumentRefused: ``path`` exists; secrets are never overwritten.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise DocumentRefused(f"{path}: exists and is not overwritten; move it away first") from error
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def read_private(path: Path) -> bytes:
    """The content of ``path``.

    Raises:
        DocumentRefused: it is missing, empty, over 64 KiB, or others may read it.
    """
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_mode & _OTHERS:
                raise DocumentRefused(f"{path}: readable by others; run chmod 600 {path}")
            content = stream.read(_MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise DocumentRefused(f"{path}: {error.strerror}; create it or correct the path") from error
    if not 0 < len(content) <= _MAX_SECRET_BYTES:
        raise DocumentRefused(f"{path}: a secret of 1 to {_MAX_SECRET_BYTES} bytes expected")
    return content


def ensure_token(path: Path) -> Path:
    """``path``, which afterwards holds 256 random bits as text; an existing token is kept."""
    if not path.exists():
        create_private(path, secrets.token_urlsafe(32).encode())
    read_private(path)
    return path
