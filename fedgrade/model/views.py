"""Public views of a photo that grade like the photo itself: flips and a half turn of the network's input.

They are deterministic and part of the sealed job, so they say nothing about a photo. An item's gradient is averaged
over them before it is clipped (augmentation multiplicity, De et al. 2022, https://arxiv.org/abs/2204.13650); the unit
of privacy stays the item.
"""

from dataclasses import dataclass
from typing import Protocol, assert_never

import numpy as np

from fedgrade.model.preprocessing import ByteArray, FeatureArray
from fedgrade.model.spec import View
from fedgrade.trust.canonical import digest as document_digest

_HEIGHT, _WIDTH = -2, -1


def seen(inputs: FeatureArray, view: View) -> FeatureArray:
    """Network inputs [..., height, width] as ``view`` shows them; no number changes, only where it stands."""
    return np.ascontiguousarray(np.flip(inputs, axis=_flipped(view)))


class Extractor(Protocol):
    """What turns photos into features."""

    digest: str
    dimensions: int

    def prepare(self, image: ByteArray) -> FeatureArray:
        """Network input [3, input, input] of an upright photo ``image`` [height, width, 3]."""

    def extract(self, batch: FeatureArray) -> FeatureArray:
        """Features [photos, dimensions] of ``batch`` [photos, 3, input, input]."""


@dataclass(frozen=True, kw_only=True)
class ViewedExtractor:
    """``extractor`` as it sees photos by ``view``; caches keep its features apart by its own digest."""

    extractor: Extractor
    view: View

    @property
    def digest(self) -> str:
        """Of what the features depend on; upright ones are those of the extractor itself."""
        if self.view == "upright":
            return self.extractor.digest
        return document_digest(f"{self.extractor.digest}\n{self.view}".encode())

    @property
    def dimensions(self) -> int:
        """Length of one feature vector."""
        return self.extractor.dimensions

    def prepare(self, image: ByteArray) -> FeatureArray:
        """Network input [3, input, input] of an upright photo ``image`` [height, width, 3]."""
        return seen(self.extractor.prepare(image), self.view)

    def extract(self, batch: FeatureArray) -> FeatureArray:
        """Features [photos, dimensions] of ``batch`` [photos, 3, input, input]."""
        return self.extractor.extract(batch)


def _flipped(view: View) -> tuple[int, ...]:
    match view:
        case "upright":
            return ()
        case "flip_horizontal":
            return (_WIDTH,)
        case "flip_vertical":
            return (_HEIGHT,)
        case "rotate_180":
            return (_HEIGHT, _WIDTH)
        case _:
            assert_never(view)
