"""Gradients of single items, clipped: the head's private training. The one file that knows Opacus.

The unit is the item: its photos' losses are averaged before its gradient is clipped. Two recipes:
:func:`clipped_gradient_sum` for the full-batch modes (closed form, exact integer grid, noise added by the caller), and
:func:`train_by_sgd` for ``local_sgd`` (DP-SGD, Abadi et al. 2016, arXiv 1607.00133), where an item's photos are one
sample to Opacus, so that its per-sample gradient *is* the item's mean gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch.nn import functional

from fedgrade.errors import ModelRefused
from fedgrade.privacy.grid import grid_rows
from fedgrade.privacy.noise import floating_gaussian, poisson_sample
from fedgrade.trust.records import DiscreteGaussian, PoissonGaussian

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_CHUNK_ITEMS = 128


@dataclass(frozen=True, kw_only=True)
class ItemBatch:
    """Items ready for the head: sensitive, so passed and never stored or sent.

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

    def take(self, chosen: npt.NDArray[np.bool_] | slice) -> "ItemBatch":
        """The chosen items alone."""
        return ItemBatch(
            inputs=self.inputs[chosen], photo_weights=self.photo_weights[chosen], grades=self.grades[chosen]
        )

    def __len__(self) -> int:
        return len(self.grades)


@dataclass(frozen=True, kw_only=True)
class SgdRecipe:
    """How ``local_sgd`` trains between two uploads: everything here is public."""

    mechanism: PoissonGaussian
    max_grad_norm: float
    learning_rate: float
    declared_items: int


def clipped_gradient_sum(
    thresholds: FloatArray, batch: ItemBatch, *, max_grad_norm: float, mechanism: DiscreteGaussian
) -> IntArray:
    """Exact sum over items of the clipped per-item gradients at ``thresholds``, on the mechanism's grid.

    Args:
        thresholds: [grades - 1, features], the head's weights.
        batch: the items.
        max_grad_norm: L2 clip of one item's mean gradient.
        mechanism: states the grid; no noise is added here.

    Returns:
        Integers [(grades - 1) * features].

    Guarantee: one item more or less moves the result by at most ``mechanism.sensitivity`` in L2 norm.
    """
    total = np.zeros(thresholds.size, dtype=np.int64)
    for rows in _gradient_rows(thresholds, batch):
        total += grid_rows(rows, max_norm=max_grad_norm, mechanism=mechanism).sum(axis=0, dtype=np.int64)
    return total


def train_by_sgd(thresholds: FloatArray, batch: ItemBatch, recipe: SgdRecipe) -> FloatArray:
    """The change of ``thresholds`` [grades - 1, features] after the recipe's Poisson-sampled DP-SGD steps (Opacus).

    Every item joins each step independently with the mechanism's sampling rate; an empty batch is a step like any
    other. Batches and noise are drawn from the operating system; the noise is in floating point: reports say so.
    """
    module = _per_item_head(thresholds)
    optimizer = _PrivateOptimizer(
        torch.optim.SGD(module.parameters(), lr=recipe.learning_rate),
        noise_multiplier=float(recipe.mechanism.noise_multiplier),
        max_grad_norm=recipe.max_grad_norm,
        expected_batch_size=max(1, round(recipe.declared_items * recipe.mechanism.sampling_rate)),
        loss_reduction="mean",
    )
    for _ in range(recipe.mechanism.steps):
        chosen = poisson_sample(len(batch), rate=float(recipe.mechanism.sampling_rate))
        optimizer.zero_grad()
        _backward(module, batch.take(chosen))
        optimizer.step()
    trained = _weight(module).detach().numpy().astype(np.float64)
    module.remove_hooks()
    return np.asarray(trained - thresholds, dtype=np.float64)


def _gradient_rows(thresholds: FloatArray, batch: ItemBatch) -> Iterator[FloatArray]:
    """Per-item gradients [items of a chunk, (grades - 1) * features]; chunks bound the memory."""
    for start in range(0, len(batch), _CHUNK_ITEMS):
        yield _item_gradients(thresholds, batch.take(slice(start, start + _CHUNK_ITEMS)))


def _item_gradients(thresholds: FloatArray, batch: ItemBatch) -> FloatArray:
    """Mean gradients [items, (grades - 1) * features] of the items: (sigmoid(W_k . x) - t) x over their photos.

    Guarantee: a row depends on its own item alone, to the last bit, wherever it stands and however far it is padded.
    A matrix product's last bits depend on who else is in it, so that one item more could move every other row across a
    border of the grid, beyond the sensitivity (Casacuberta et al. 2022, arXiv 2207.10635). Here sums run along one
    photo's features, or photo after photo. A row that overflows is not finite; the grid drops it.
    """
    items, photos, features = batch.inputs.shape
    above = batch.grades[:, None] > np.arange(len(thresholds))
    rows = np.zeros((items, len(thresholds), features))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for photo in range(photos):
            inputs = np.ascontiguousarray(batch.inputs[:, photo])
            scores = np.stack([(inputs * threshold).sum(axis=1) for threshold in thresholds], axis=1)
            # tanh saturates instead of overflowing.
            residuals = 0.5 * (1.0 + np.tanh(0.5 * scores)) - above
            rows += (residuals * batch.photo_weights[:, photo, None])[:, :, None] * inputs[:, None, :]
    return np.asarray(rows.reshape(items, -1), dtype=np.float64)


def _per_item_head(thresholds: FloatArray) -> GradSampleModule:
    """A fresh linear head under Opacus' hooks; a module is never wrapped twice."""
    outputs, inputs = thresholds.shape
    head = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(thresholds))
    return GradSampleModule(head, batch_first=True, loss_reduction="sum")


def _backward(module: GradSampleModule, batch: ItemBatch) -> None:
    """Leave each item's mean gradient in ``grad_sample``; an item whose gradient is not finite counts as zero."""
    weight = _weight(module)
    if len(batch) == 0:
        # Opacus takes the batch size from the gradients; an empty batch has noise alone, and still counts.
        weight.grad_sample = torch.zeros((0, *weight.shape), dtype=weight.dtype)
        return
    # Opacus' hooks warn unless the inputs ask for a gradient too; it is not used.
    inputs = torch.from_numpy(batch.inputs).requires_grad_()
    scores = module(inputs)  # [items, photos, grades - 1]
    ranks = torch.arange(scores.shape[-1])
    exceeds = (torch.from_numpy(batch.grades)[:, None] > ranks).to(scores.dtype)
    losses = functional.binary_cross_entropy_with_logits(
        scores, exceeds[:, None, :].expand_as(scores), reduction="none"
    ).sum(dim=-1)
    torch.autograd.backward((losses * torch.from_numpy(batch.photo_weights)).sum())
    finite = torch.isfinite(weight.grad_sample).flatten(1).all(dim=1)
    weight.grad_sample = torch.where(finite[:, None, None], weight.grad_sample, 0.0)


def _weight(module: GradSampleModule) -> Any:
    """The head's one parameter; Opacus hangs an untyped ``grad_sample`` [items, ...] on it."""
    (parameter,) = module.parameters()
    return parameter


class _PrivateOptimizer(DPOptimizer):  # type: ignore[misc] # Opacus publishes no types
    """Opacus' clipping and scaling with the operating system's noise: Opacus' own has 32 bits of seed (torch's)."""

    def add_noise(self) -> None:
        """Leave the noisy sum of clipped gradients in each parameter's ``grad``."""
        scale = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noise = torch.from_numpy(floating_gaussian(parameter.numel(), scale=scale))
            parameter.grad = parameter.summed_grad + noise.to(parameter.dtype).view_as(parameter)
