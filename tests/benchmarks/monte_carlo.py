"""Delta of composed steps by chance: a third opinion on epsilon, which shares no code with any accountant.

One step's outcomes are sorted into bins and the tails are cut off. Both only take from delta: binning is
post-processing, and each outcome that is left out would have added something. What is estimated is therefore a lower
bound on delta, and by how little it is lower is a matter of the bins alone.

delta(epsilon) is the mean of (1 - exp(epsilon - L))+ over privacy losses L of all steps together, drawn with the item
present. Losses that large are rare, so that they are drawn from a tilted distribution under which epsilon is their
mean, and weighted back (importance sampling; Glasserman 2003, section 4.6). Only losses above epsilon count, whose
weights are bounded.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp, ndtr

FloatArray = npt.NDArray[np.float64]

_BINS = 4000
_TAIL = 12.0  # standard deviations: what lies beyond has less than 1e-32
_LARGEST_TILT = 1e4
_LARGEST_EPSILON = 1000.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step's outcomes: log-probability [outcomes] with the item and without."""

    present: FloatArray
    absent: FloatArray

    @property
    def losses(self) -> FloatArray:
        """Privacy loss [outcomes] of each outcome."""
        return self.present - self.absent

    def reversed(self) -> "Step":
        """The other direction of adjacency: the item is added instead of removed."""
        return Step(present=self.absent, absent=self.present)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Drawn losses of all steps together [samples], and the logarithms of their weights [samples]."""

    losses: FloatArray
    log_weights: FloatArray

    def delta(self, epsilon: float) -> Estimate:
        """Delta at ``epsilon``."""
        above = np.maximum(self.losses - epsilon, 0.0)
        values = np.exp(np.minimum(self.log_weights, 700.0)) * -np.expm1(-above)
        return Estimate(mean=float(values.mean()), error=float(values.std() / math.sqrt(len(values))))

    def epsilon(self, delta: float, *, errors: float = 0.0) -> float:
        """The epsilon at which delta, so many standard ``errors`` above its mean, is ``delta``; 0 if none is."""

        def excess(epsilon: float) -> float:
            estimate = self.delta(epsilon)
            return estimate.mean + errors * estimate.error - delta

        return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, _LARGEST_EPSILON, xtol=1e-5))


def sampled_gaussian(rate: float, noise_multiplier: float) -> Step:
    """A Poisson-sampled Gaussian step of sensitivity 1, in bins."""
    edges = np.linspace(-_TAIL * noise_multiplier, 1 + _TAIL * noise_multiplier, _BINS + 1)
    without = _masses(edges / noise_multiplier)
    shifted = _masses((edges - 1) / noise_multiplier)
    return Step(present=np.log((1 - rate) * without + rate * shifted), absent=np.log(without))


def discrete_gaussian(sensitivity: int, scale: int) -> Step:
    """A discrete Gaussian of ``scale`` moved by ``sensitivity``, outcome by outcome."""
    reach = math.ceil(_TAIL * scale)
    outcomes = np.arange(-reach, reach + sensitivity + 1, dtype=np.float64)
    log_total = logsumexp(-0.5 * (np.arange(-3 * reach, 3 * reach + 1) / scale) ** 2)

    def log_probability(centre: int) -> FloatArray:
        return np.asarray(-0.5 * ((outcomes - centre) / scale) ** 2 - log_total)

    return Step(present=log_probability(sensitivity), absent=log_probability(0))


def draw_losses(step: Step, *, steps: int, epsilon: float, samples: int, rng: np.random.Generator) -> Losses:
    """``samples`` losses of ``steps`` steps, most of them near ``epsilon``."""
    tilt = _tilt(step, mean=epsilon / steps)
    log_factor = float(logsumexp(step.present + tilt * step.losses))
    chances = np.exp(step.present + tilt * step.losses - log_factor)
    thresholds = np.cumsum(chances)
    losses = np.zeros(samples)
    for _ in range(steps):
        found = np.searchsorted(thresholds, rng.random(samples) * thresholds[-1], side="right")
        losses += step.losses[np.minimum(found, len(chances) - 1)]
    return Losses(losses=losses, log_weights=steps * log_factor - tilt * losses)


def _tilt(step: Step, *, mean: float) -> float:
    """The exponent, not negative, under which one step's loss is ``mean`` on average."""

    def cumulant(tilt: float) -> float:
        return float(logsumexp(step.present + tilt * step.losses)) - tilt * mean

    return max(0.0, float(minimize_scalar(cumulant, bounds=(0.0, _LARGEST_TILT), method="bounded").x))


def _masses(edges: FloatArray) -> FloatArray:
    """Of the standard normal between ``edges`` [bins + 1], exact in both tails; [bins]."""
    low, high = edges[:-1], edges[1:]
    return np.asarray(np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low)))
