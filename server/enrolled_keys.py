"""The node keys that a SuperLink takes now, looked up so that strangers who ask with keys of their own cost little."""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

# Keys are read again after so long, or sooner for one that is not among them; but reading takes a twentieth of the time
# at most, whatever strangers ask. Flower looks the key up once more behind this, so that a revocation counts at once.
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
        self._kept_until = self._asked_again_from = -float("inf")
        self._reading = asyncio.Lock()

    async def find(self, pem: bytes) -> ec.EllipticCurvePublicKey | None:
        """The key that ``pem`` spells, if it is enrolled."""
        if self._stale(pem):
            async with self._reading:
                # Somebody who came first may have read them meanwhile.
                if self._stale(pem):
                    await self._refresh()
        return self._keys.get(pem)

    def _stale(self, pem: bytes) -> bool:
        now = self._clock()
        return now >= self._kept_until or (pem not in self._keys and now >= self._asked_again_from)

    async def _refresh(self) -> None:
        began = self._clock()
        found = await asyncio.to_thread(lambda: frozenset(self._read()))
        self._keys = {pem: self._keys.get(pem) or _load(pem) for pem in found}
        now = self._clock()
        pause = max(_KEPT_AT_LEAST_SECONDS, (now - began) / _READING_SHARE)
        self._asked_again_from, self._kept_until = now + pause, now + max(_KEPT_SECONDS, pause)


def _load(pem: bytes) -> ec.EllipticCurvePublicKey:
    key = serialization.load_pem_public_key(pem)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TypeError(f"node key: Flower enrolled {type(key).__name__}, which it never takes")
    return key
