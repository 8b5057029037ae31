"""How a process keeps memory between rounds: large buffers are used again, and not mapped and cleared anew."""

import ctypes
from typing import Final

# Of mallopt(3), in <malloc.h>.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
# The most that glibc takes.
_MAPPED_FROM_BYTES: Final = 32 * 2**20
_KEPT_BYTES: Final = 64 * 2**20


def keep_large_buffers() -> bool:
    """Have this process keep up to 64 MiB that it freed, and take buffers below 32 MiB from there; whether it does.

    A round of a model of some megabytes frees and takes as much dozens of times. glibc by itself gives it back to the
    kernel each time, which then has to clear every page once more. Where the C library has no such switch, as on macOS
    or with musl, nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
