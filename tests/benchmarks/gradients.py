"""What item-level privacy costs a step: the same model and batch without privacy, by the product, and by Opacus.

Every way ends with one clipped sum of item gradients (without privacy: the sum). Noise is left out on all sides: it
does not depend on the number of items, and has figures of its own. One thread each, double precision throughout.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from stopwatch import paired_seconds, ratio
from torch import nn
from torch.nn import functional

from fedgrade.items import ItemBatch
from fedgrade.job import JobSpec
from fedgrade.model.head import head_inputs
from fedgrade.model.networks import item_module
from fedgrade.model.spec import ModelSpec
from fedgrade.training import SgdRecipe, _GhostSteps, clipped_gradient_sum
from fedgrade.trust.records import DiscreteGaussian, PoissonGaussian

ITEMS = 1024
REPETITIONS = 15
CLIP = 1.0
PRODUCT, PLAIN = "fedgrade", "no privacy (torch)"
HOOKS, FUNCTORCH, GHOST = "Opacus, hooks", "Opacus, functorch", "Opacus, ghost"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model at its start, and a batch of items of one photo each."""

    model: ModelSpec
    thresholds: npt.NDArray[np.float64]
    batch: ItemBatch

    def module(self) -> nn.Module:
        """A fresh module of the model."""
        change = np.zeros(self.model.network_parameters, dtype=np.float32)
        centre = np.zeros(self.model.feature_dimensions)
        return item_module(self.model, thresholds=self.thresholds, centre=centre, change=change)


def gradients(spec: JobSpec) -> str:
    """Tables of the head and of the adapter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # A head in the making: at zero, gradients of the adapter would vanish.
        head = _problem(spec, spec.model)
        adapter = _problem(spec, replace(spec.model, trainable="adapter", pooling=("average",)))
        tables = [_table("head", head, _head_ways(head)), _table("adapter and head", adapter, _adapter_ways(adapter))]
    finally:
        torch.set_num_threads(threads)
    setup = (
        f"{ITEMS} items, medians of {REPETITIONS} repetitions in turn; one thread, float64; clipped sums, no noise. "
        "*fedgrade* is `clipped_gradient_sum` for the head (every item on the exact integer grid, by sums whose last "
        "bit no other item can move), and the step of `local_sgd` for the adapter (rank 16, features of one pooling)."
    )
    return "\n\n".join([setup, *tables])


def _problem(spec: JobSpec, model: ModelSpec) -> Problem:
    rng = np.random.default_rng(0)
    centre = rng.normal(size=model.feature_dimensions) * 0.01
    inputs = head_inputs(np.abs(rng.normal(size=(ITEMS, model.feature_dimensions))), centre)
    return Problem(
        model=model,
        thresholds=rng.normal(size=(spec.grading.grades - 1, inputs.shape[1])),
        batch=ItemBatch(
            inputs=inputs[:, None, :],
            photo_weights=np.ones((ITEMS, 1)),
            grades=rng.integers(spec.grading.grades, size=ITEMS),
        ),
    )


def _head_ways(problem: Problem) -> dict[str, Callable[[], object]]:
    mechanism = DiscreteGaussian(sensitivity=2**20, scale=2**24)
    return {
        PLAIN: _plain(problem),
        PRODUCT: lambda: clipped_gradient_sum(
            problem.thresholds, problem.batch, max_grad_norm=CLIP, mechanism=mechanism
        ),
        GHOST: _ghost(problem),
        HOOKS: _materialised(problem, functorch=False),
        FUNCTORCH: _materialised(problem, functorch=True),
    }


def _adapter_ways(problem: Problem) -> dict[str, Callable[[], object]]:
    recipe = SgdRecipe(
        mechanism=PoissonGaussian(sampling_rate=Fraction(1), noise_multiplier=Fraction(1), steps=1),
        max_grad_norm=CLIP,
        learning_rate=1e-6,
        declared_items=ITEMS,
    )
    steps = _GhostSteps(problem.module(), problem.batch, recipe)

    def product() -> None:
        steps._optimizer.zero_grad()
        steps._add(problem.batch)

    return {
        PLAIN: _plain(problem),
        PRODUCT: product,
        GHOST: _ghost(problem),
        HOOKS: _materialised(problem, functorch=False),
        FUNCTORCH: _materialised(problem, functorch=True),
    }


def _plain(problem: Problem) -> Callable[[], object]:
    module, inputs, grades = problem.module(), torch.from_numpy(problem.batch.inputs), _exceeds(problem)

    def step() -> None:
        module.zero_grad()
        torch.autograd.backward(_losses(module, inputs, grades).mean())

    return step


def _materialised(problem: Problem, *, functorch: bool) -> Callable[[], object]:
    """Each item's gradient in memory, clipped and added up by Opacus' optimizer."""
    wrapped = GradSampleModule(_plain_layers(problem), loss_reduction="sum", force_functorch=functorch)
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1e-6), noise_multiplier=0.0, max_grad_norm=CLIP,
        expected_batch_size=ITEMS,
    )  # fmt: skip
    inputs, grades = torch.from_numpy(problem.batch.inputs).requires_grad_(), _exceeds(problem)

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
    inputs, grades = torch.from_numpy(problem.batch.inputs).requires_grad_(), _exceeds(problem)

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
    return _linear(module) if isinstance(module, nn.Linear) else _with_linear_layers(module)


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
    return functional.binary_cross_entropy_with_logits(scores, exceeds, reduction="none").sum(dim=(1, 2))


def _exceeds(problem: Problem) -> torch.Tensor:
    above = problem.batch.grades[:, None] > np.arange(len(problem.thresholds))
    return torch.from_numpy(above[:, None, :].astype(np.float64))


def _table(title: str, problem: Problem, ways: dict[str, Callable[[], object]]) -> str:
    parameters = sum(parameter.numel() for parameter in problem.module().parameters())
    seconds = paired_seconds(ways, repetitions=REPETITIONS)
    lines = [f"| {title}, {parameters:,} parameters | ms a step | of no privacy | hooks take so many times that |"]
    lines.append("|---|---|---|---|")
    for name, taken in seconds.items():
        lines.append(
            f"| {name} | {1000 * statistics.median(taken):.1f} | {ratio(seconds, name, PLAIN):.1f} | "
            f"{ratio(seconds, HOOKS, name):.1f} |"
        )
    return "\n".join(lines)
