"""What item-level privacy costs a step: the same model and batch without privacy, by the product, and by Opacus.

Every way ends with one clipped sum of item gradients (without privacy: the sum). Noise is left out on all sides: it
does not depend on the number of items, and has figures of its own. One thread each.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizer
from stopwatch import paired_seconds, ratio
from torch import nn
from torch.nn import functional

from fedgrade.full_batch import clipped_gradient_sum
from fedgrade.items import ItemBatch, ItemPhotos
from fedgrade.job import JobSpec
from fedgrade.model.compute import Compute
from fedgrade.model.head import head_inputs
from fedgrade.model.networks import item_module
from fedgrade.model.spec import RESNET10T_GN_START_DIGEST, ModelSpec
from fedgrade.privacy.plan import TRAIN_GRID_BITS
from fedgrade.training import _PHOTO_ITEMS, SgdRecipe, _GhostSteps, _PhotoSteps
from fedgrade.trust.records import DiscreteGaussian, PoissonGaussian
from server.configure import compose_job

ITEMS, REPETITIONS = 1024, 15
PHOTOS, PHOTO_REPETITIONS = 16, 5
CLIP = 1.0
RECIPE = SgdRecipe(
    mechanism=PoissonGaussian(sampling_rate=Fraction(1), noise_multiplier=Fraction(1), steps=1, planned_steps=1),
    max_grad_norm=CLIP,
    learning_rate=1e-6,
    declared_items=ITEMS,
)
PRODUCT, PLAIN = "fedgrade", "no privacy (torch)"
HOOKS, FUNCTORCH, GHOST, EXPANDED = "Opacus, hooks", "Opacus, functorch", "Opacus, ghost", "Opacus, ew"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model at its start, and a batch of items of one photo each.

    ``inputs`` is what the module sees: [items, 1, features + 1] or [items, 3, input, input].
    """

    model: ModelSpec
    thresholds: npt.NDArray[np.float64]
    inputs: npt.NDArray[Any]
    grades: npt.NDArray[np.int64]
    repetitions: int

    def module(self) -> nn.Module:
        """A fresh module of the model."""
        change = np.zeros(self.model.network_parameters, dtype=np.float32)
        centre = np.zeros(self.model.feature_dimensions)
        return item_module(self.model, thresholds=self.thresholds, centre=centre, change=change).train()


def gradients(spec: JobSpec) -> str:
    """Tables of the head, of the adapter and of a whole network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        head = _on_features(spec, spec.model)
        adapter = _on_features(spec, replace(spec.model, trainable="adapter", pooling=("average",)))
        network = _on_photos(spec)
        tables = [
            _table(f"head, {ITEMS} items", head, {PRODUCT: _full_batch(head), **_others(head)}),
            _table(f"adapter and head, {ITEMS} items", adapter, {PRODUCT: _ghost_steps(adapter), **_others(adapter)}),
            _table(f"network and head, {PHOTOS} photos", network, {PRODUCT: _one_by_one(network), **_others(network)}),
        ]
    finally:
        torch.set_num_threads(threads)
    setup = (
        f"Medians of {REPETITIONS} repetitions in turn ({PHOTO_REPETITIONS} for photos); one thread; clipped sums, no "
        "noise. *fedgrade* is `clipped_gradient_sum` for the head (exact products of integers: "
        "no other item can move a last bit), and a step of `local_sgd` for the adapter (rank 16, features of one "
        "pooling) and for the network (ResNet-10-T with group norms, photos of 96 pixels; a pass for each item by "
        "itself, clip and sum in double precision). Features are in double precision for all, photos in single."
    )
    return "\n\n".join([setup, *tables])


def _on_features(spec: JobSpec, model: ModelSpec) -> Problem:
    rng = np.random.default_rng(0)
    centre = rng.normal(size=model.feature_dimensions) * 0.01
    inputs = head_inputs(np.abs(rng.normal(size=(ITEMS, model.feature_dimensions))), centre)
    return Problem(
        model=model,
        # A head in the making: at zero, gradients of the adapter would vanish.
        thresholds=rng.normal(size=(spec.grading.grades - 1, inputs.shape[1])),
        inputs=inputs[:, None, :],
        grades=rng.integers(spec.grading.grades, size=ITEMS),
        repetitions=REPETITIONS,
    )


def _on_photos(spec: JobSpec) -> Problem:
    rng = np.random.default_rng(0)
    model = ModelSpec(
        backbone="resnet10t_gn", input_size=96, pooling=("average",), weights_digest=RESNET10T_GN_START_DIGEST,
        trainable="network",
    )  # fmt: skip
    return Problem(
        model=model,
        thresholds=rng.normal(size=(spec.grading.grades - 1, model.feature_dimensions + 1)),
        inputs=rng.normal(size=(PHOTOS, 3, model.input_size, model.input_size)).astype(np.float32),
        grades=rng.integers(spec.grading.grades, size=PHOTOS),
        repetitions=PHOTO_REPETITIONS,
    )


def _others(problem: Problem) -> dict[str, Callable[[], object]]:
    return {
        PLAIN: _plain(problem),
        GHOST: _ghost(problem),
        HOOKS: _materialised(problem, GradSampleModule(_plain_layers(problem), loss_reduction="sum")),
        FUNCTORCH: _materialised(
            problem, GradSampleModule(_plain_layers(problem), loss_reduction="sum", force_functorch=True)
        ),
        EXPANDED: _materialised(problem, GradSampleModuleExpandedWeights(_plain_layers(problem), loss_reduction="sum")),
    }


def _full_batch(problem: Problem) -> Callable[[], object]:
    mechanism, batch = DiscreteGaussian(sensitivity=2**TRAIN_GRID_BITS, scale=2**44), _batch(problem)
    return lambda: clipped_gradient_sum(problem.thresholds, batch, max_grad_norm=CLIP, mechanism=mechanism)


def _ghost_steps(problem: Problem) -> Callable[[], object]:
    batch = _batch(problem)
    steps = _GhostSteps(problem.module(), batch, RECIPE)

    def step() -> None:
        steps._optimizer.zero_grad()
        steps._add(batch)

    return step


def _one_by_one(problem: Problem) -> Callable[[], object]:
    photos = ItemPhotos(
        opened=lambda numbers: problem.inputs[numbers],
        photos=tuple(np.array([number]) for number in range(PHOTOS)),
        grades=problem.grades,
        views=("upright",),
        compute=Compute(device="cpu", threads=1),
    )
    steps = _PhotoSteps(problem.module(), photos, RECIPE)

    def step() -> None:
        steps._optimizer.zero_grad()
        for start in range(0, PHOTOS, _PHOTO_ITEMS):
            steps._add(photos.take(slice(start, start + _PHOTO_ITEMS)))

    return step


def _batch(problem: Problem) -> ItemBatch:
    return ItemBatch(inputs=problem.inputs, photo_weights=np.ones((ITEMS, 1)), grades=problem.grades)


def _plain(problem: Problem) -> Callable[[], object]:
    module, inputs, grades = problem.module(), torch.from_numpy(problem.inputs), _exceeds(problem)

    def step() -> None:
        module.zero_grad()
        torch.autograd.backward(_losses(module, inputs, grades).mean())

    return step


def _materialised(problem: Problem, wrapped: nn.Module) -> Callable[[], object]:
    """Each item's gradient in memory, clipped and added up by Opacus' optimizer."""
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1e-6), noise_multiplier=0.0, max_grad_norm=CLIP,
        expected_batch_size=len(problem.grades),
    )  # fmt: skip
    inputs, grades = torch.from_numpy(problem.inputs).requires_grad_(), _exceeds(problem)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(_losses(wrapped, inputs, grades).sum())
        optimizer.clip_and_accumulate()

    return step


def _ghost(problem: Problem) -> Callable[[], object]:
    """Norms alone, then a second backward pass with clipped weights: as Opacus' own loss does it."""
    wrapped = GradSampleModuleFastGradientClipping(
        _plain_layers(problem), loss_reduction="sum", max_grad_norm=CLIP, use_ghost_clipping=True
    )
    inputs, grades = torch.from_numpy(problem.inputs).requires_grad_(), _exceeds(problem)

    def step() -> None:
        losses = _losses(wrapped, inputs, grades)
        torch.autograd.backward(losses.sum(), retain_graph=True)
        wrapped.zero_grad()
        weights = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        torch.autograd.backward((weights * losses).sum())
        wrapped.enable_hooks()

    return step


def _plain_layers(problem: Problem) -> nn.Module:
    """The same module of torch's own linear layers, so that Opacus does what it does for anyone."""
    module = problem.module()
    return _linear(module) if isinstance(module, nn.Linear) else _with_linear_layers(_nothing_overwritten(module))


class _Copied(nn.Module):
    """What comes in, where it may be written over: timm adds a block's shortcut in place."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """``maps``, once more."""
        return maps.clone()


def _nothing_overwritten(module: nn.Module) -> nn.Module:
    """``module`` as Opacus' hooks need it: they see a layer's output, which nothing after it may write over."""
    for part in module.modules():
        if hasattr(part, "inplace"):
            setattr(part, "inplace", False)  # noqa: B010 - torch types attributes of modules as tensors
    for part in list(module.modules()):
        if getattr(part, "drop_path", part) is None:
            part.drop_path = _Copied()
    return module


def _with_linear_layers(module: nn.Module) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, _linear(child))
    return module


def _linear(layer: nn.Linear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=layer.weight.dtype)
    plain.load_state_dict(layer.state_dict())
    return plain


def _losses(module: nn.Module, inputs: torch.Tensor, exceeds: torch.Tensor) -> torch.Tensor:
    """Losses [items]."""
    scores = module(inputs)
    losses = functional.binary_cross_entropy_with_logits(scores, exceeds.view_as(scores), reduction="none")
    return losses.flatten(1).sum(dim=1)


def _exceeds(problem: Problem) -> torch.Tensor:
    above = problem.grades[:, None] > np.arange(len(problem.thresholds))
    return torch.from_numpy(above.astype(problem.inputs.dtype))


def _table(title: str, problem: Problem, ways: dict[str, Callable[[], object]]) -> str:
    parameters = sum(parameter.numel() for parameter in problem.module().parameters())
    seconds = paired_seconds(ways, repetitions=problem.repetitions)
    lines = [f"| {title}, {parameters:,} parameters | ms a step | of no privacy | hooks take so many times that |"]
    lines.append("|---|---|---|---|")
    for name, taken in seconds.items():
        lines.append(
            f"| {name} | {1000 * statistics.median(taken):.1f} | {ratio(seconds, name, PLAIN):.1f} | "
            f"{ratio(seconds, HOOKS, name):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(gradients(compose_job(["experiment=demo"])))
