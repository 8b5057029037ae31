"""From any upright photo to the backbone's input, as the backbone was trained: with Pillow and numpy, without torch.

The steps are timm's own data configuration for ``tf_efficientnet_lite0``: shorter side to input / 0.875, the central
square, bicubic, mean 0.5, deviation 0.5. What lies outside the central 87.5 % of the shorter side is not seen.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedgrade.errors import DataRefused

ByteArray = npt.NDArray[np.uint8]
FeatureArray = npt.NDArray[np.float32]

CROP_FRACTION = 0.875
MEAN = 0.5
DEVIATION = 0.5
CHANNELS = 3
# Part of every extractor's digest: change it with any line below that changes a pixel.
PREPROCESSING = "central square 0.875, bicubic, mean 0.5, deviation 0.5, version 1"


def prepare(image: ByteArray, input_size: int) -> FeatureArray:
    """The central square of ``image`` [height, width, 3] as backbone input [3, input_size, input_size] in [-1, 1].

    Cropping and scaling are one resampling, so that a photo one pixel high and millions wide costs no more memory
    than any other.

    Raises:
        DataRefused: not a photo of 8-bit colour channels.
    """
    if image.dtype != np.uint8 or image.ndim != CHANNELS or image.shape[2] != CHANNELS or image.size == 0:
        raise DataRefused(f"photo: {image.dtype} {image.shape}; uint8 [height, width, {CHANNELS}] is expected")
    height, width = image.shape[:2]
    side = min(height, width) * CROP_FRACTION
    left, top = (width - side) / 2, (height - side) / 2
    square = Image.fromarray(image).resize(
        (input_size, input_size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    scaled = (np.asarray(square, dtype=np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(DEVIATION)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))
