"""Photos on disk for small federations, and their features.

They are generated, because what is under test is the machinery; nothing here measures quality. The extractor is a fixed
random projection of a photo's pixels: real and deterministic, and it needs no network.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fedgrade.data.manifest import Photo, Provenance, Split
from fedgrade.data.photos import PhotoLimits, open_photo, verify_photos
from fedgrade.grading import GradeScale
from fedgrade.model.compute import Compute
from fedgrade.model.preprocessing import prepare
from fedgrade.model.spec import ModelSpec, View
from fedgrade.model.views import seen

PIXELS = 8
ITEMS = 16  # of a site, half of them held out
SCALE = GradeScale(
    name="three", labels=("A", "B", "C"), critical=("C",), cost=((0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (4.0, 2.0, 0.0))
)


@dataclass(frozen=True, kw_only=True)
class ProjectedPhotos:
    """Photos of one folder; their features are a fixed random projection of their pixels."""

    root: Path
    opened: list[str] = field(default_factory=list)

    def prepare(self, model: ModelSpec, photos: Sequence[Photo]) -> None:
        verify_photos(photos, self.root, PhotoLimits())
        self.features(model, photos, "upright")

    @property
    def compute(self) -> Compute:
        return Compute(device="cpu", threads=1)

    def features(self, model: ModelSpec, photos: Sequence[Photo], view: View) -> np.ndarray:
        self.opened.extend(photo.path for photo in photos)
        pixels = [seen(open_photo(self.root, photo, PhotoLimits())[:, :, 0], view).ravel() for photo in photos]
        rows = np.array(pixels, dtype=np.float32).reshape(len(photos), PIXELS * PIXELS)
        # One photo at a time: the last bits of a product of matrices depend on how many rows there are.
        return np.array([row @ projection(model.feature_dimensions) for row in rows])

    def inputs(self, model: ModelSpec, photos: Sequence[Photo]) -> np.ndarray:
        self.opened.extend(photo.path for photo in photos)
        images = [open_photo(self.root, photo, PhotoLimits()) for photo in photos]
        return np.stack([prepare(image, model.input_size) for image in images])


@cache
def projection(dimensions: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(PIXELS * PIXELS, dimensions)).astype(np.float32)


def photo_bytes(grade: int, seed: int) -> bytes:
    """A PNG whose bright third is its grade, under a little noise."""
    pixels = np.random.default_rng(seed).integers(0, 40, (PIXELS, PIXELS), dtype=np.uint8)
    third = PIXELS // 3
    pixels[:, grade * third : (grade + 1) * third] += 180
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_photos(root: Path, *, first: int, items: int = ITEMS) -> list[Photo]:
    """``items`` items below ``root``, half of them held out; every third has two photos."""
    root.mkdir(parents=True)
    photos = []
    for number in range(first, first + items):
        grade, split = number % SCALE.grades, Split.TRAIN if number % 4 < 2 else Split.TEST
        for view in range(2 if number % 3 == 0 else 1):
            raw, name = photo_bytes(grade, 2 * number + view), f"{number:04d}-{view}.png"
            (root / name).write_bytes(raw)
            photos.append(
                Photo(
                    path=name,
                    digest=hashlib.sha256(raw).hexdigest(),
                    item=f"item-{number:04d}",
                    source=f"source-{number:04d}",
                    grade=SCALE.labels[grade],
                    split=split,
                    provenance=Provenance.REAL,
                    licence="own",
                    origin="generated for a test",
                )
            )
    return photos
