"""Gradients of single items, clipped, for ``local_sgd``: private training. The one file that knows Opacus.

The unit is the item: its photos' and views' gradients are averaged before they are clipped. :func:`train_by_sgd` is
DP-SGD (Abadi et al. 2016, arXiv 1607.00133) of any module; :mod:`fedgrade.full_batch` is what the other modes do.

Opacus is used by its parts, never by ``make_private``: its modules give norms a sample, its optimizers clip, add up and
step. Sampling, noise, the number of steps and the batch size that updates are scaled by come from the
plan, and nothing of Opacus outlives a round.
"""

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import (
    GradSampleModuleFastGradientClipping,
    register_grad_sampler,
    register_norm_sampler,
)
from opacus.grad_sample.linear import compute_linear_grad_sample
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn import functional

from fedgrade.errors import ModelRefused
from fedgrade.items import ItemBatch, ItemPhotos
from fedgrade.model.compute import enough_memory, torch_device, torch_threads
from fedgrade.model.networks import PhotoLinear, learning_parameters
from fedgrade.model.preprocessing import FeatureArray
from fedgrade.privacy.noise import floating_gaussian, poisson_sample
from fedgrade.trust.records import PoissonGaussian

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Bounds of memory, none of privacy: the sum is the same wherever batches are cut.
_GHOST_ITEMS = 1024
_PHOTO_ITEMS = 8
# Numbers widened to double precision at a time: few enough to stay in a core's cache.
_BLOCK = 2**18
# What rounding in double precision can add to a clipped item's length is a thousand times less than this takes off.
_SHRINK = 1.0 - 2.0**-20
_LARGEST_CHANGE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class SgdRecipe:
    """How ``local_sgd`` trains between two uploads: everything here is public."""

    mechanism: PoissonGaussian
    max_grad_norm: float
    learning_rate: float
    declared_items: int


def train_by_sgd(module: nn.Module, items: ItemBatch | ItemPhotos, recipe: SgdRecipe) -> FloatArray:
    """The change [parameters] of what learns of ``module`` after the recipe's Poisson-sampled DP-SGD steps (Opacus).

    Every item joins each step independently with the mechanism's sampling rate; an empty batch is a step like any
    other. Batches and noise are drawn from the operating system; the noise is in floating point: reports say so.
    ``module`` is a fresh one, which a round uses up; parameters stand in its own order.

    Guarantee: every number is finite, whatever the items and the weights. One that no single precision holds, because
    public weights or a public learning rate drove the steps that far, is the largest that it does.

    Raises:
        ModelRefused: Opacus cannot train ``module`` privately, or a statistic in it changed on the way.
    """
    if errors := ModuleValidator.validate(module.train(), strict=False):
        raise ModelRefused(f"model: cannot be trained privately: {errors[0]}")
    before, frozen = _flat(module), _buffers(module)
    with closing(_steps(module, items, recipe)) as steps:
        for _ in range(recipe.mechanism.steps):
            steps.step(poisson_sample(len(items), rate=float(recipe.mechanism.sampling_rate)))
    if _buffers(module) != frozen:
        raise ModelRefused("model: statistics of the frozen network changed in training; nothing of it is sent")
    return _in_single_range(_flat(module) - before)


def _in_single_range(change: FloatArray) -> FloatArray:
    """``change`` [parameters] within what single precision holds; what is no number becomes the largest.

    Each step's noisy gradient is finite for any item, so that this looks at nothing but what is private already. A
    coordinator refuses numbers as large: an update that diverged does not pass for one that did not.
    """
    bound = _LARGEST_CHANGE
    return np.asarray(np.clip(np.nan_to_num(change, nan=bound), -bound, bound), dtype=np.float64)


def _steps(module: nn.Module, items: ItemBatch | ItemPhotos, recipe: SgdRecipe) -> "_GhostSteps | _PhotoSteps":
    match items:
        case ItemBatch():
            return _GhostSteps(module, items, recipe)
        case ItemPhotos():
            return _PhotoSteps(module, items, recipe)
        case _:
            assert_never(items)


def _linear_norms(
    layer: PhotoLinear, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Upper bounds [items] of the norms of items' gradients, from inner products of their photos.

    Opacus' own norm is this one without the second term, which is what rounding can hide: where large gradients of an
    item's photos cancel, the square root of a difference of inner products may come out as nothing at all.
    """
    inputs, (_, photos, _) = activations[0], backprops.shape
    squares = torch.einsum("nik,njk->nij", backprops, backprops) * torch.einsum("nik,njk->nij", inputs, inputs)
    longest = (backprops.norm(dim=2) * inputs.norm(dim=2)).sum(dim=1)
    hidden = torch.finfo(inputs.dtype).eps * (inputs.shape[2] + backprops.shape[2] + photos**2)
    return {layer.weight: torch.sqrt(squares.sum(dim=(1, 2)).clamp(min=0) + hidden * longest.square())}


register_grad_sampler(PhotoLinear)(compute_linear_grad_sample)
register_norm_sampler(PhotoLinear)(_linear_norms)


class _GhostSteps:
    """DP-SGD steps of linear layers on features: norms without gradients, then one weighted backward pass.

    Li et al. (2022), "ghost clipping", https://arxiv.org/abs/2110.05679. An item is one sample to Opacus and its photos
    a sequence, so that what is clipped is the item's own mean gradient.
    """

    def __init__(self, module: nn.Module, items: ItemBatch, recipe: SgdRecipe) -> None:
        self._items = items
        self._module = GradSampleModuleFastGradientClipping(
            module, batch_first=True, loss_reduction="sum", max_grad_norm=recipe.max_grad_norm
        )
        self._optimizer = _GhostOptimizer(**_settings(module, recipe))

    def step(self, chosen: BoolArray) -> None:
        """One step with the ``chosen`` items, in pieces that bound the memory; with none it is one of noise alone."""
        batch = self._items.take(chosen)
        self._optimizer.zero_grad()
        for start in range(0, len(batch), _GHOST_ITEMS):
            self._add(batch.take(slice(start, start + _GHOST_ITEMS)))
        for parameter in self._optimizer.params:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()

    def close(self) -> None:
        """Leave the module as an ordinary one."""
        self._module.remove_hooks()

    def _add(self, batch: ItemBatch) -> None:
        """Add the clipped gradients of ``batch`` to the step's sum."""
        if not len(batch):
            return
        losses = _ordinal_losses(self._scores(batch), batch.grades) * torch.from_numpy(batch.photo_weights)
        per_item = losses.sum(dim=1)
        torch.autograd.backward(per_item.sum(), retain_graph=True)
        finite = torch.isfinite(self._module.get_norm_sample())
        for parameter in self._optimizer.params:
            parameter.grad = None
        if not finite.all():
            # An item whose gradient is not finite counts as zero. Its weight alone could be zero, but zero times
            # infinity is not: it must not be in the sum at all.
            self._add(batch.take(finite.numpy()))
            return
        weights = self._module.get_clipping_coef()
        self._module.disable_hooks()
        torch.autograd.backward((weights * per_item).sum())
        self._module.enable_hooks()
        self._optimizer.accumulate()

    def _scores(self, batch: ItemBatch) -> torch.Tensor:
        # Opacus' hooks warn unless the inputs ask for a gradient too; it is not used.
        scores: torch.Tensor = self._module(torch.from_numpy(batch.inputs).requires_grad_())
        return scores


class _PhotoSteps:
    """DP-SGD steps of a network on photos: an ordinary backward pass for each item by itself, clipped after it.

    Guarantee: an item's gradient depends on that item alone, to the last bit, whatever the network does: no pass sees
    two items. A gradient a sample of a batch, as Opacus' hooks give it, depends on its neighbours by rounding, which
    weights can be made to enlarge. It is not faster on a CPU either: it writes each gradient several times, and beside
    them the batch's own, for nothing.
    """

    def __init__(self, module: nn.Module, items: ItemPhotos, recipe: SgdRecipe) -> None:
        self._items = items
        self._device = torch_device(items.compute.device)
        # For one photo on a CPU torch falls back to slow convolutions, which are the least slow with channels last.
        with enough_memory(self._device):
            self._module = module.to(self._device).to(memory_format=torch.channels_last)
        self._optimizer = _PhotoOptimizer(**_settings(module, recipe))
        # An item a thread, not a layer in several: threads that meet after every layer wait for whoever lost a core.
        self._workers = ThreadPoolExecutor(items.compute.threads if self._device == "cpu" else 1)

    def step(self, chosen: BoolArray) -> None:
        """One step with the ``chosen`` items, in pieces that bound the memory; with none it is one of noise alone."""
        photos = self._items.take(chosen)
        self._optimizer.zero_grad()
        repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        with torch_threads(1), repeatable, enough_memory(self._device):
            for start in range(0, len(photos), _PHOTO_ITEMS):
                self._add(photos.take(slice(start, start + _PHOTO_ITEMS)))
        # The step itself is always that of an empty batch: it adds nothing but noise to what has been summed up.
        for parameter in self._optimizer.params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        self._optimizer.step()

    def close(self) -> None:
        """Leave the module on the CPU, and no thread behind."""
        self._workers.shutdown(cancel_futures=True)
        self._module.to("cpu")

    def _add(self, photos: ItemPhotos) -> None:
        """Add the clipped gradients of the items to the step's sum."""
        gradients = self._workers.map(functools.partial(self._item_gradients, photos), range(len(photos)))
        for parameter, parts in zip(self._optimizer.params, zip(*gradients, strict=True), strict=True):
            parameter.grad_sample = [part[None] for part in parts]
        self._optimizer.clip_and_accumulate()

    def _item_gradients(self, photos: ItemPhotos, item: int) -> list[torch.Tensor]:
        """Each parameter's gradient [...] of one item's mean loss over its photos and views."""
        inputs = len(photos.photos[item]) * len(photos.views)
        parts = [self._gradients(shown, photos.grades[item], 1.0 / inputs) for shown in photos.shown(item)]
        return [functools.reduce(torch.add, part) for part in zip(*parts, strict=True)]

    def _gradients(self, inputs: FeatureArray, grade: np.int64, weight: float) -> tuple[torch.Tensor, ...]:
        """Each parameter's gradient [...] of the losses of one item's ``inputs``, added up and times ``weight``."""
        # A copy of torch's own: where an array begins in memory may decide last bits too.
        alone = torch.tensor(inputs, device=self._device).contiguous(memory_format=torch.channels_last)
        losses = _ordinal_losses(self._module(alone), np.repeat(grade, len(inputs)))
        return torch.autograd.grad(weight * losses.sum(), self._optimizer.params)


def _ordinal_losses(scores: torch.Tensor, grades: IntArray) -> torch.Tensor:
    """Losses [...] of ``scores`` [..., grades - 1] for items of ``grades`` along the first axis."""
    exceeds = torch.from_numpy(grades[:, None] > np.arange(scores.shape[-1])).to(scores)
    while exceeds.ndim < scores.ndim:
        exceeds = exceeds[:, None]
    return functional.binary_cross_entropy_with_logits(scores, exceeds.expand_as(scores), reduction="none").sum(dim=-1)


def _settings(module: nn.Module, recipe: SgdRecipe) -> dict[str, Any]:
    """What both of Opacus' optimizers are given."""
    return {
        "optimizer": torch.optim.SGD(learning_parameters(module), lr=recipe.learning_rate),
        "noise_multiplier": float(recipe.mechanism.noise_multiplier),
        "max_grad_norm": recipe.max_grad_norm,
        "expected_batch_size": max(1, round(recipe.declared_items * recipe.mechanism.sampling_rate)),
        "loss_reduction": "mean",
    }


def _clip_factors(rows: list[list[torch.Tensor]], max_grad_norm: float) -> torch.Tensor:
    """What items' gradients are multiplied by: [items]. Each parameter has a list of one part [1, ...] an item.

    Guarantee: with its factor a gradient is ``max_grad_norm`` long or less as a whole, for any that single precision
    holds: their squares neither overflow nor vanish in double precision. One that is not finite has a factor of zero.
    """
    lengths = torch.stack([_length([parts[item] for parts in rows]) for item in range(len(rows[0]))])
    return torch.where(torch.isfinite(lengths), (max_grad_norm * _SHRINK / lengths).clamp(max=1.0), 0.0)


def _length(parts: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all numbers in ``parts`` together, in double precision."""
    lengths = [torch.linalg.vector_norm(block.double()) for part in parts for block in _blocks(part)]
    together: torch.Tensor = torch.linalg.vector_norm(torch.stack(lengths))
    return together


def _blocks(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``part`` [1, rows, ...] in pieces [some rows, ...] of about ``_BLOCK`` numbers."""
    return torch.split(part[0], max(1, _BLOCK * part.shape[1] // part.numel()))


def _add_noise(optimizer: DPOptimizer) -> None:
    """Leave the noisy sum of clipped gradients in each parameter's ``grad``; rounded to its precision after that alone.

    The noise is the operating system's: Opacus' own has 32 bits of seed (torch's).
    """
    scale = optimizer.noise_multiplier * optimizer.max_grad_norm
    for parameter in optimizer.params:
        noise = torch.from_numpy(floating_gaussian(parameter.numel(), scale=scale)).to(parameter.device)
        parameter.grad = (parameter.summed_grad + noise.view_as(parameter)).to(parameter.dtype)


class _PhotoOptimizer(DPOptimizer):  # type: ignore[misc] # Opacus publishes no types
    """Opacus' steps on items' gradients in single precision, clipped and summed in double, with the system's noise.

    Opacus' own clip measures, scales and sums in the parameters' precision: its norm of millions of numbers may be
    short by a thousandth, and a gradient that is not finite spoils the sum.
    """

    def clip_and_accumulate(self) -> None:
        """Add each parameter's clipped ``grad_sample``, a list of one [1, ...] an item, to its ``summed_grad``."""
        rows = [parameter.grad_sample for parameter in self.params]
        factors = _clip_factors(rows, self.max_grad_norm).tolist() if len(rows[0]) else []
        for parameter, parts in zip(self.params, rows, strict=True):
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros_like(parameter, dtype=torch.float64)
            # Zero times infinity is not zero: what is not finite must not be in the sum at all.
            kept = [(factor, _blocks(part)) for factor, part in zip(factors, parts, strict=True) if factor]
            for block, total in enumerate(_blocks(parameter.summed_grad[None])):
                for factor, blocks in kept:
                    total.add_(blocks[block].double(), alpha=factor)

    def add_noise(self) -> None:
        """See :func:`_add_noise`."""
        _add_noise(self)


class _GhostOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc] # Opacus publishes no types
    """Opacus' sum of weighted gradients, with the operating system's noise."""

    def add_noise(self) -> None:
        """See :func:`_add_noise`."""
        _add_noise(self)


def _flat(module: nn.Module) -> FloatArray:
    """What learns of ``module``, as one vector."""
    parts = [parameter.detach().cpu().numpy().ravel() for parameter in learning_parameters(module)]
    return np.concatenate(parts).astype(np.float64)


def _buffers(module: nn.Module) -> dict[str, str]:
    """SHA-256 of everything in ``module`` that is no parameter: statistics that must stay public."""
    return {
        name.removeprefix("_module."): hashlib.sha256(buffer.cpu().numpy().tobytes()).hexdigest()
        for name, buffer in module.named_buffers()
    }
