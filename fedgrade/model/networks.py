"""What learns, as torch modules: a head on features, an adapter and a head, a network and a head.

Parameters stand in one order, which is also how their change travels: the head's thresholds, then the adapter's or the
network's in timm's order. Knows neither Opacus nor privacy, but is built for both: nothing here mixes two photos, and
nothing has statistics that training could change.
"""

from typing import Any, Self, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedgrade.errors import ModelRefused
from fedgrade.model.adapter import Adapter
from fedgrade.model.backbones import export, starting_network
from fedgrade.model.compute import Chunks, Compute, enough_memory, one_by_one, torch_device, torch_threads
from fedgrade.model.head import BIAS_FEATURE
from fedgrade.model.pooling import PooledBackbone, pooled
from fedgrade.model.preprocessing import FeatureArray
from fedgrade.model.spec import ModelSpec

FloatArray = npt.NDArray[np.float64]


class PhotoLinear(nn.Linear):
    """A linear map of each photo's features [items, photos, features], without a constant."""

    def __init__(self, weights: FloatArray, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(weights.shape[1], weights.shape[0], bias=False, dtype=dtype)
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(weights))


class ChannelAffine(nn.Module):
    """Scale and shift of each channel of [photos, channels, height, width]: what is trained of a batch norm."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """``maps``, scaled and shifted."""
        return maps * self.weight[:, None, None] + self.bias[:, None, None]


class FrozenBatchNorm(nn.Module):
    """A batch norm whose statistics stay as they are, however training is switched; scale and shift may learn."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm2d(norm.num_features, eps=norm.eps, affine=False)
        self.statistics.load_state_dict(dict(norm.named_buffers()))
        self.affine = ChannelAffine(norm.weight, norm.bias)
        self.after: nn.Module = getattr(norm, "act", nn.Identity())

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's signature
        """The statistics stay in evaluation mode: in training mode they would carry un-noised photos out."""
        super().train(mode)
        self.statistics.train(mode=False)
        return self

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """``maps`` [photos, channels, height, width], normalised by fixed statistics; no photo sees another."""
        activated: torch.Tensor = self.after(self.affine(self.statistics(maps)))
        return activated


class AdapterAndHead(nn.Module):
    """:class:`fedgrade.model.adapter.Adapter` and a head, on features."""

    def __init__(self, thresholds: FloatArray, adapter: Adapter) -> None:
        super().__init__()
        self.thresholds = PhotoLinear(thresholds)
        self.down = PhotoLinear(adapter.down)
        self.up = PhotoLinear(adapter.up)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scores [items, photos, grades - 1] of the head's ``inputs`` [items, photos, dimensions + 1]."""
        features, bias = inputs[..., :-1], inputs[..., -1:]
        adapted = features + self.up(torch.relu(self.down(features)))
        scores: torch.Tensor = self.thresholds(torch.cat([adapted, bias], dim=-1))
        return scores


class NetworkAndHead(nn.Module):
    """A network whose norms or whole is trained, and a head, on photos."""

    centre: torch.Tensor

    def __init__(self, spec: ModelSpec, *, thresholds: FloatArray, centre: FloatArray, change: FeatureArray) -> None:
        super().__init__()
        self.thresholds = PhotoLinear(thresholds, dtype=torch.float32)
        self.network = _changed(_learning(spec), change)
        self.pooling = spec.pooling
        self.register_buffer("centre", torch.from_numpy(centre.astype(np.float32)))

    def features(self, photos: torch.Tensor) -> torch.Tensor:
        """Features [photos, dimensions] of ``photos`` [photos, 3, input, input]."""
        return pooled(self.network, self.pooling, photos)

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        """Scores [photos, grades - 1]: those of :func:`fedgrade.model.head.head_inputs` under the thresholds."""
        units, usable = _units(self.features(photos))
        centred, _ = _units(torch.where(usable, units - self.centre, 0.0))
        bias = centred.new_full((len(centred), 1), BIAS_FEATURE)
        scores: torch.Tensor = self.thresholds(torch.cat([centred, bias], dim=1))
        return scores


class TrainedExtractor:
    """Features by a network with a trained ``change``; the counterpart of a frozen backbone's extractor.

    Attributes:
        dimensions: length of one feature vector.
    """

    def __init__(self, spec: ModelSpec, change: FeatureArray, *, compute: Compute) -> None:
        """Raises ``DataRefused`` if the device does not hold the network."""
        head, centre = np.zeros((1, spec.feature_dimensions + 1)), np.zeros(spec.feature_dimensions)
        self._device, self._threads = torch_device(compute.device), compute.threads
        self._chunks = Chunks(f"features on {self._device}")
        module = NetworkAndHead(spec, thresholds=head, centre=centre, change=change).eval()
        with enough_memory(self._device):
            self._module = module.to(self._device)
        self.dimensions = spec.feature_dimensions

    def extract(self, batch: FeatureArray) -> FeatureArray:
        """Features [photos, dimensions] of ``batch`` [photos, 3, input, input].

        Guarantee: a photo's features depend on that photo alone.
        """
        with torch_threads(self._threads):
            return one_by_one(
                self._module.features, batch, device=self._device, dimensions=self.dimensions, chunks=self._chunks
            )


def exported_network(spec: ModelSpec, change: FeatureArray) -> bytes:
    """The network with a trained ``change`` as ONNX, from photos to features; see :class:`TrainedExtractor`.

    Raises:
        ModelRefused: the change does not fit, or torch could not.
    """
    return export(spec, PooledBackbone(_changed(_learning(spec), change), spec.pooling))


def item_module(spec: ModelSpec, *, thresholds: FloatArray, centre: FloatArray, change: FeatureArray) -> nn.Module:
    """A fresh module that learns what ``spec`` lets it, ``change`` [parameters] away from the public start.

    Raises:
        ModelRefused: the public weights are missing or not the pinned ones.
    """
    match spec.trainable:
        case "head":
            return PhotoLinear(thresholds)
        case "adapter":
            return AdapterAndHead(thresholds, Adapter.changed(spec, change))
        case "norms" | "network":
            return NetworkAndHead(spec, thresholds=thresholds, centre=centre, change=change)
        case _:
            assert_never(spec.trainable)


def learning_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What learns of ``module``, in the order in which its change travels."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _learning(spec: ModelSpec) -> nn.Module:
    """The public network with the parameters of ``spec.trainable`` learning and all others frozen."""
    network = starting_network(spec)
    network.requires_grad_(requires_grad=spec.trainable == "network")
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, frozen := FrozenBatchNorm(child))
                frozen.affine.requires_grad_(requires_grad=spec.trainable == "norms")
    return network


def _changed(network: nn.Module, change: FeatureArray) -> nn.Module:
    """``network`` with ``change`` added to what learns of it, parameter after parameter."""
    parameters = learning_parameters(network)
    sizes = [parameter.numel() for parameter in parameters]
    if change.shape != (sum(sizes),):
        raise ModelRefused(f"network: a change of shape {change.shape} does not fit {sum(sizes)} parameters")
    with torch.no_grad():
        for parameter, part in zip(parameters, torch.split(torch.from_numpy(change.copy()), sizes), strict=True):
            parameter.add_(part.view_as(parameter))
    return network


def _units(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [photos, dimensions] scaled to length 1, and which of them [photos, 1] are not zero; zeros stay."""
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1.0)
    squares = scaled.square().sum(dim=1, keepdim=True)
    return scaled * torch.rsqrt(torch.where(largest > 0, squares, 1.0)), largest > 0


def named_learning(spec: ModelSpec) -> dict[str, Any]:
    """Shapes of what learns of ``spec``'s network, by timm's names, in the order of travel."""
    named = _learning(spec).named_parameters()
    return {name.replace(".affine.", "."): tuple(entry.shape) for name, entry in named if entry.requires_grad}
