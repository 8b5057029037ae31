"""Items as training sees them: features side by side, or photos that are opened when a step wants them.

Sensitive both: passed from hand to hand, never stored, sent or printed. Knows nothing of gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedgrade.errors import ModelRefused
from fedgrade.model.compute import Compute
from fedgrade.model.preprocessing import FeatureArray
from fedgrade.model.spec import View
from fedgrade.model.views import seen
from fedgrade.privacy.fixed_point import FixedPointPhotos

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

PHOTOS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class ItemBatch:
    """Items ready for the head: sensitive, so passed and never stored or sent. A view counts as a photo of its own.

    Attributes:
        inputs: [items, photos, features] of the head, zero-padded to the item with most photos.
        photo_weights: [items, photos], 1/photos of the item for a photo and 0 for padding.
        grades: [items], positions on the scale.
    """

    inputs: FloatArray
    photo_weights: FloatArray
    grades: IntArray

    def __post_init__(self) -> None:
        items, photos, _ = self.inputs.shape
        if self.photo_weights.shape != (items, photos) or self.grades.shape != (items,):
            raise ModelRefused("item batch: inputs, photo weights and grades are not of the same items")

    def __repr__(self) -> str:
        return "ItemBatch(<sensitive>)"

    @cached_property
    def fixed_point(self) -> FixedPointPhotos:
        """The inputs in fixed point, made when they are first asked for: rounds that share a batch share them."""
        return FixedPointPhotos.of(self.inputs)

    def take(self, chosen: npt.NDArray[np.bool_] | slice) -> "ItemBatch":
        """The chosen items alone."""
        return ItemBatch(
            inputs=self.inputs[chosen], photo_weights=self.photo_weights[chosen], grades=self.grades[chosen]
        )

    def __len__(self) -> int:
        return len(self.grades)


@dataclass(frozen=True, kw_only=True)
class ItemPhotos:
    """Items whose photos are opened whenever a step wants them: sensitive, so passed and never stored or sent.

    Attributes:
        opened: network inputs [photos, 3, input, input] of upright photos, by their numbers.
        photos: the numbers of each item's photos.
        grades: [items], positions on the scale.
        views: what is shown of each photo.
        compute: what the network runs on.
    """

    opened: Callable[[IntArray], FeatureArray]
    photos: tuple[IntArray, ...]
    grades: IntArray
    views: tuple[View, ...]
    compute: Compute

    def __post_init__(self) -> None:
        if self.grades.shape != (len(self.photos),) or not all(len(numbers) for numbers in self.photos):
            raise ModelRefused("item photos: grades and photos are not of the same items, or an item has no photo")

    def __repr__(self) -> str:
        return "ItemPhotos(<sensitive>)"

    def take(self, chosen: npt.NDArray[np.bool_] | slice) -> "ItemPhotos":
        """The chosen items alone."""
        positions = np.arange(len(self))[chosen]
        return replace(self, photos=tuple(self.photos[item] for item in positions), grades=self.grades[chosen])

    def shown(self, item: int) -> Iterator[FeatureArray]:
        """Network inputs [inputs, 3, input, input] of one item's photos in every view, a few at a time."""
        numbers, at_once = self.photos[item], max(1, PHOTOS_AT_ONCE // len(self.views))
        for start in range(0, len(numbers), at_once):
            upright = self.opened(numbers[start : start + at_once])
            yield np.concatenate([seen(upright, view) for view in self.views])

    def __len__(self) -> int:
        return len(self.grades)
