"""The ONNX file of a release: made from it, and held against it before anyone uses it.

A file that agrees with the release on inputs that nobody could foresee is the same model, as far as such inputs tell;
it is not proof that no input exists on which they part.
"""

from pathlib import Path
from typing import Final

import numpy as np

from fedgrade.errors import ModelRefused
from fedgrade.federation.grading_desk import grader
from fedgrade.federation.release import OpenedRelease
from fedgrade.grading import decide, expected_costs
from fedgrade.model.adapter import Adapter
from fedgrade.model.backbones import exported_backbone, onnx_runner
from fedgrade.model.portable import COSTS, GRADE, PROBABILITIES, OrdinalHead, require_plain, whole_model
from fedgrade.model.preprocessing import CHANNELS, PREPROCESSING, FeatureArray

# Of a probability. Measured: 3e-8 for a frozen backbone, whose features are the same numbers; 1e-6 for a network that
# torch runs here and onnxruntime there. Another version of torch folds a backbone's norms in another order.
MAX_DIFFERENCE: Final = 1e-4
_RANDOM: Final = 8  # photos of noise, and as many of coarse patches
_PATCHES: Final = 7  # along a side


def portable_release(opened: OpenedRelease, *, cache: Path) -> bytes:
    """The model of ``opened`` as an ONNX file; see :func:`fedgrade.model.portable.whole_model`.

    Raises:
        ModelRefused: the public weights are missing, or cannot be exported.
    """
    job, head = opened.release.job, opened.head
    model = job.spec.model
    if model.on_features:
        network = exported_backbone(model, cache)
    else:
        # Torch takes seconds to start; a frozen backbone that is kept exported does without.
        from fedgrade.model.networks import exported_network  # noqa: PLC0415

        network = exported_network(model, head.network)
    adapter = Adapter.changed(model, head.network) if model.trainable == "adapter" else None
    ordinal = OrdinalHead(scale=job.spec.grading, thresholds=head.thresholds, centre=head.centre, adapter=adapter)
    notes = {
        "asset_type": job.spec.data.asset_type,
        "input": f"{CHANNELS} x {model.input_size} x {model.input_size}: {PREPROCESSING}",
        "release": opened.digest,
    }
    return whole_model(network, ordinal, notes=notes)


def require_equal(raw: bytes, opened: OpenedRelease, *, cache: Path, rng: np.random.Generator) -> float:
    """The largest difference between a probability that the ONNX file ``raw`` gives and the release's own.

    Both see noise, coarse patches, plain colours, and photos with a pixel that is no number. ``rng`` should be one that
    whoever made the file could not foresee.

    Raises:
        ModelRefused: the file is no such model, or differs by more than :data:`MAX_DIFFERENCE`, or gives other grades.
    """
    require_plain(raw)
    spec = opened.release.job.spec
    inputs = _inputs(spec.model.input_size, rng)
    ours = grader(spec.model, opened.head, cache=cache, device="cpu")(inputs)
    run, shape = onnx_runner(raw, threads=1), (len(inputs), spec.grading.grades)
    try:
        found = run(inputs)
    except Exception as error:  # onnxruntime's own classes have no common name
        raise ModelRefused(f"ONNX: cannot be run: {' '.join(str(error).split())[:200]}") from error
    if found[PROBABILITIES].shape != shape or found[COSTS].shape != shape or found[GRADE].shape != shape[:1]:
        raise ModelRefused(f"ONNX: gives {found[PROBABILITIES].shape} for {shape[0]} photos and {shape[1]} grades")
    costs = expected_costs(ours, spec.grading)
    dearest = max(1.0, float(spec.grading.cost_matrix.max()))
    differences = np.abs(found[PROBABILITIES] - ours), np.abs(found[COSTS] - costs) / (dearest * spec.grading.grades)
    largest = max(float(difference.max()) for difference in differences)
    # Written so that a NaN is refused.
    if not largest <= MAX_DIFFERENCE:
        raise ModelRefused(
            f"ONNX: a probability differs by {largest:.2g} from the release's own; at most {MAX_DIFFERENCE:g} is "
            "allowed; it is another model, or this machine's versions of torch and onnxruntime are at odds"
        )
    cheapest = np.sort(costs, axis=1)
    clear = cheapest[:, 1] - cheapest[:, 0] > 2 * MAX_DIFFERENCE * dearest * spec.grading.grades
    if (found[GRADE] != decide(ours, spec.grading))[clear].any():
        raise ModelRefused("ONNX: gives another grade than the release where one is clearly cheapest")
    return largest


def _inputs(size: int, rng: np.random.Generator) -> FeatureArray:
    """Photos [photos, 3, size, size] of no real thing, in [-1, 1] but for the last two."""
    noise = rng.uniform(-1, 1, (_RANDOM, CHANNELS, size, size))
    coarse = rng.uniform(-1, 1, (_RANDOM, CHANNELS, _PATCHES, _PATCHES))
    enlarged = np.arange(size) * _PATCHES // size
    patches = coarse[:, :, enlarged][:, :, :, enlarged]
    plain = np.broadcast_to(np.array([-1.0, 0.0, 1.0]).reshape(-1, 1, 1, 1), (3, CHANNELS, size, size))
    strange = noise[:2].copy()
    strange[0, 0, 0, 0], strange[1, 1, 1, 1] = np.nan, np.inf
    return np.concatenate([noise, patches, plain, strange]).astype(np.float32)
