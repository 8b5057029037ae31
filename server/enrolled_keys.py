"""The node keys that a SuperLink takes now, looked up so that strangers who ask with keys of their own cost little."""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

# Keys are read again after so long, or sooner for one that is not among them, who waits for that; but reading takes a
# twentieth of the time at most, whatever strangers ask. server/node_identity.py looks the key up once more, so that a
# revocation counts at once.
_KEPT_SECONDS: Final = 1.0
_KEPT_AT_LEAST_SECONDS: Final = 0.05
_READING_SHARE: Final = 0.05


class EnrolledKeys:
    """Enrolled node keys, by the PEM in which Flower keeps them.

    Args:
        read: reads all of them; called in a thread of its own.
        clock: seconds, monotonic.
    """

    def __init__(self, read: Callable[[], Iterable[bytes]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._keys: dict[bytes, ec.EllipticCurvePublicKey] = {}
        self._began = self._kept_until = self._next_from = -float("inf")
        self._reading = asyncio.Lock()

    async def find(self, pem: bytes) -> ec.EllipticCurvePublicKey | None:
        """The key that ``pem`` spells, if it is enrolled."""
        asked = self._clock()
        if pem not in self._keys or asked >= self._kept_until:
            async with self._reading:
                # What somebody who came first had read since will do.
                if self._began < asked:
                    await asyncio.sleep(max(0.0, self._next_from - self._clock()))
                    await self._refresh()
        return self._keys.get(pem)

    async def _refresh(self) -> None:
        self._began = self._clock()
        found = await asyncio.to_thread(lambda: frozenset(self._read()))
        self._keys = {pem: self._keys.get(pem) or _load(pem) for pem in found}
        now = self._clock()
        pause = max(_KEPT_AT_LEAST_SECONDS, (now - self._began) / _READING_SHARE)
        self._next_from, self._kept_until = now + pause, now + max(_KEPT_SECONDS, pause)


def _load(pem: bytes) -> ec.EllipticCurvePublicKey:
    key = serialization.load_pem_public_key(pem)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError(f"node key: Flower enrolled {type(key).__name__}, which it never takes")
    return key
