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
    """Have this process use buffers below 32 MiB again after it freed them; whether the C library does.

    A round of a model of some megabytes frees and takes as much dozens of times. glibc by itself keeps at the end of
    each of its arenas about twice the largest buffer it has seen, and gives the rest back to the kernel, which then
    has to clear every page once more. From here on that is 64 MiB an arena, and glibc adapts it no longer. Where the C
    library has no such switch, as on macOS or with musl, nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    taken = [mallopt(_MMAP_THRESHOLD, _MAPPED_FROM_BYTES), mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)]
    return all(taken)
