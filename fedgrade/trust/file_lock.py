"""The lock by which a file has one writer, and by which others see whether it has."""

import fcntl
import time
from pathlib import Path
from typing import IO, Final

# Whoever only looks holds the lock too, for less than a millisecond.
_TRIES: Final = 30
_PAUSE_SECONDS: Final = 0.01


def lock_alone(file: IO[bytes] | IO[str] | int) -> bool:
    """Whether the open ``file`` is this process's alone from now on; tried for a moment.

    Raises:
        OSError: the file system knows no locks.
    """
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
    return False


def is_held(path: Path) -> bool:
    """Whether a process holds the lock on the file at ``path``; False where there is none."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
