"""Network inputs of photos that steps of training open again and again, in the memory of the partner's own process.

A photo of 12 megapixels takes 0.3 s to read, check, decode and scale; its pass through a small network takes less than
a tenth of a second. Sensitive: never stored, sent or printed.
"""

import threading
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

FeatureArray = npt.NDArray[np.float32]

KEPT_BYTES = 2**30  # 1,780 inputs of 224 pixels, 9,700 of 96


class KeptInputs:
    """Inputs [3, input, input] by their photo's SHA-256 and their size: the first that fit.

    Batches are sampled at random: to make room for the photo that came last would only drop one as likely to come back.
    """

    def __init__(self, *, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._kept: dict[tuple[str, int], FeatureArray] = {}
        self._bytes = 0
        self._adding = threading.Lock()

    def __repr__(self) -> str:
        return "KeptInputs(<sensitive>)"

    def input(self, digest: str, size: int, prepared: Callable[[], FeatureArray]) -> FeatureArray:
        """What is kept of the photo at ``size``, else what ``prepared`` gives, kept if it fits. Not to be changed."""
        kept = self._kept.get((digest, size))
        if kept is not None:
            return kept
        fresh = prepared()
        with self._adding:
            if (digest, size) not in self._kept and self._bytes + fresh.nbytes <= self._limit:
                self._kept[digest, size] = fresh
                self._bytes += fresh.nbytes
        return fresh

    def forget_others(self, digests: Iterable[str]) -> None:
        """Let go of every photo whose digest is not among ``digests``."""
        wanted = set(digests)
        with self._adding:
            self._kept = {key: kept for key, kept in self._kept.items() if key[0] in wanted}
            self._bytes = sum(kept.nbytes for kept in self._kept.values())
