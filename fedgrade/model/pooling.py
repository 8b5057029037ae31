"""A frozen feature map, pooled to one vector a photo. Torch only; which network made the map is not known here."""

from typing import Any, Self, assert_never

import torch
from torch import nn

from fedgrade.model.spec import Pooling

HEIGHT_AND_WIDTH = (2, 3)
# Below what float32 can see of a deviation; keeps the square root's slope finite where a channel is constant.
SMALLEST_VARIANCE = 1e-12


def pool(feature_map: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One statistic [photos, channels] of each channel of ``feature_map`` [photos, channels, height, width]."""
    match pooling:
        case "average":
            return feature_map.mean(HEIGHT_AND_WIDTH)
        case "maximum":
            return feature_map.amax(HEIGHT_AND_WIDTH)
        case "standard_deviation":
            centred = feature_map - feature_map.mean(HEIGHT_AND_WIDTH, keepdim=True)
            return (centred.square().mean(HEIGHT_AND_WIDTH) + SMALLEST_VARIANCE).sqrt()
        case _:
            assert_never(pooling)


def pooled(network: nn.Module, pooling: tuple[Pooling, ...], photos: torch.Tensor) -> torch.Tensor:
    """Features [photos, channels * len(pooling)] of ``photos`` [photos, 3, input, input]: the last map, pooled."""
    maker: Any = network
    feature_map = maker.forward_features(photos)
    return torch.cat([pool(feature_map, each) for each in pooling], dim=1)


class PooledBackbone(nn.Module):
    """``network``'s last feature map, pooled: [photos, 3, input, input] to [photos, channels * len(pooling)].

    Guarantee: stays in evaluation mode whatever ``train()`` is told. A batch norm in training mode would carry
    un-noised statistics of the photos out in its buffers, and Opacus does not object to a frozen one.
    """

    def __init__(self, network: nn.Module, pooling: tuple[Pooling, ...]) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.requires_grad_(requires_grad=False)
        self.train(mode=False)

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002, FBT001, FBT002 - torch's signature
        """Stay in evaluation mode."""
        return super().train(mode=False)

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        """Features [photos, dimensions] of ``photos`` [photos, 3, input, input]."""
        return pooled(self.network, self.pooling, photos)
