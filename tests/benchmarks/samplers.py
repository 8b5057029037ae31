"""How fast noise is drawn: the exact integer sampler beside floating-point ones that nobody should rest a claim on."""

import statistics
from importlib.metadata import version

import numpy as np
import torch
from stopwatch import paired_seconds, ratio

from fedgrade.job import JobSpec
from fedgrade.privacy.noise import discrete_gaussian, floating_gaussian
from fedgrade.privacy.plan import calibrate
from fedgrade.trust.records import DiscreteGaussian

REPETITIONS = 9
SITES = 5


def noise(spec: JobSpec) -> str:
    """Samples a second, as many at a time as one training release takes."""
    mechanism = calibrate(spec.privacy, participants=SITES).train
    if not isinstance(mechanism, DiscreteGaussian):
        raise TypeError("the noise benchmark draws integer noise")
    size = (spec.grading.grades - 1) * (spec.model.feature_dimensions + 1)
    scale = mechanism.scale
    numpy_generator, torch_generator = np.random.default_rng(), torch.Generator().manual_seed(0)
    exact = f"`discrete_gaussian`: exact integers, OpenDP {version('opendp')}"
    ways = {
        exact: lambda: discrete_gaussian(size, scale=scale),
        "`floating_gaussian`: Box and Muller on the operating system's bits": lambda: floating_gaussian(
            size, scale=scale
        ),
        f"numpy {np.__version__}, PCG64, float64": lambda: numpy_generator.normal(scale=scale, size=size),
        f"torch {torch.__version__}, float32": lambda: torch.normal(0.0, scale, (size,), generator=torch_generator),
    }
    seconds = paired_seconds(ways, repetitions=REPETITIONS)
    lines = ["| sampler | samples/s | ms a release | exact takes so many times that |", "|---|---|---|---|"]
    for name, taken in seconds.items():
        median = statistics.median(taken)
        lines.append(f"| {name} | {size / median:,.0f} | {1000 * median:.2f} | {ratio(seconds, exact, name):,.0f} |")
    setup = (
        f"{size:,} numbers at a time, one release of the demo's job, at its scale of 2^{np.log2(scale):.1f}; medians "
        f"of {REPETITIONS} repetitions in turn. A release a round is all that is drawn."
    )
    return "\n".join([setup, "", *lines])
