"""What canaries say about a claim of privacy: three checks of the noise itself, and two lower bounds on epsilon.

Statistics only. A canary is an item whose clipped row is one known unit direction, and which takes part with
probability 1/2; its score is the released sum along that direction, in units of the noise that was promised. If the
mechanism is the one that was charged for, scores are N(shift, 1) for canaries that took part and N(0, 1) for those that
did not. Nothing here proves privacy: at best it finds no evidence against the claim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from fedgrade.errors import PlanRefused
from fedgrade.privacy.accounting import gaussian_delta

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MIN_CANARIES = 100
SIGNIFICANCE = 0.05  # of the lower bounds, as the literature prints them
SHIFT_TOLERANCE = 4.0  # standard errors: a sound mechanism fails once in 16,000 audits
DEVIATION_TOLERANCE = 4.5  # standard errors: once in 147,000
_GUESSED_SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # of all canaries
_LARGEST_EPSILON = 500.0
_LARGEST_SHIFT = 30.0  # beyond it every score is told apart, and a lower bound says no more


@dataclass(frozen=True, kw_only=True)
class AuditClaim:
    """What is claimed of ``rounds`` releases: each has noise of ``noise_multiplier`` times the sensitivity.

    Together they are (``epsilon``, ``delta``)-private for one item, added or removed.
    """

    epsilon: float
    delta: Fraction
    noise_multiplier: float
    rounds: int

    @property
    def shift(self) -> float:
        """How far an item's presence moves its score, in standard deviations: sqrt(rounds) / noise multiplier."""
        return math.sqrt(self.rounds) / self.noise_multiplier


@dataclass(frozen=True, kw_only=True)
class CanaryScores:
    """Released sums along known directions, divided by sensitivity, noise multiplier and sqrt(rounds).

    Attributes:
        scores: [canaries].
        included: [canaries], which of them took part.
        idle: [directions], sums along directions that no canary has: noise alone.
    """

    scores: FloatArray
    included: BoolArray
    idle: FloatArray

    def __post_init__(self) -> None:
        if self.scores.shape != self.included.shape or len(self.scores) < MIN_CANARIES:
            raise PlanRefused(f"audit: {len(self.scores)} canaries; at least {MIN_CANARIES} are needed")
        if not 0 < int(self.included.sum()) < len(self.included):
            raise PlanRefused("audit: canaries must take part with probability 1/2; all of them did, or none")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number that was measured, and the range it must be in."""

    name: str
    measured: float
    lowest: float
    highest: float

    @property
    def passed(self) -> bool:
        """Whether it is in the range; not a number never is."""
        return self.lowest <= self.measured <= self.highest


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """A claim and what canaries say about it."""

    claim: AuditClaim
    checks: tuple[Check, ...]
    bound: float
    gaussian_bound: float

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that speak against the claim."""
        return tuple(check for check in self.checks if not check.passed)


def audit(scores: CanaryScores, claim: AuditClaim) -> AuditReport:
    """Compare ``scores`` with ``claim``: mean shift, standard deviation, and lower bounds on epsilon."""
    bound = one_run_bound(scores, claim)
    gaussian_bound = gaussian_one_run_bound(scores, claim)
    # Either bound alone is evidence, so that the larger of the two must stay below the claim.
    lower = Check(name="lower bound", measured=max(bound, gaussian_bound), lowest=0.0, highest=claim.epsilon)
    checks = (shift_check(scores, claim), deviation_check(scores), lower)
    return AuditReport(claim=claim, checks=checks, bound=bound, gaussian_bound=gaussian_bound)


def shift_check(scores: CanaryScores, claim: AuditClaim) -> Check:
    """Whether taking part moves a score as far as claimed: catches a clip, a scale or a count that is wrong."""
    inside, outside = scores.scores[scores.included], scores.scores[~scores.included]
    slack = SHIFT_TOLERANCE * math.sqrt(1 / len(inside) + 1 / len(outside))
    shift = float(inside.mean() - outside.mean())
    return Check(name="mean shift", measured=shift, lowest=claim.shift - slack, highest=claim.shift + slack)


def deviation_check(scores: CanaryScores) -> Check:
    """Whether the noise is as large as promised, and centred: about zero, over all directions without a canary.

    Measured about zero and not about the mean, so that one number added everywhere does not pass for noise.
    """
    quiet = np.concatenate([scores.scores[~scores.included], scores.idle])
    slack = DEVIATION_TOLERANCE / math.sqrt(2 * len(quiet))
    deviation = float(np.sqrt(np.mean(quiet**2)))
    return Check(name="standard deviation", measured=deviation, lowest=1 - slack, highest=1 + slack)


def one_run_bound(scores: CanaryScores, claim: AuditClaim) -> float:
    """An epsilon that the mechanism exceeds with 95 % confidence, from guesses who took part.

    Steinke, Nasr and Jagielski (2023), https://arxiv.org/abs/2305.08846, Theorem 5.2: in any mechanism that is
    (epsilon, delta)-private, the number of right guesses is dominated by a binomial of e^epsilon / (1 + e^epsilon). How
    many are guessed is chosen from the claim before any score is seen, so that nothing is searched for.
    """
    canaries, delta = len(scores.scores), float(claim.delta)

    def bound(guesses: int, right: int) -> float:
        return one_run_epsilon(canaries=canaries, guesses=guesses, right=right, delta=delta)

    guesses = _best_guesses(canaries, claim, bound=bound)
    return bound(guesses, _right_guesses(scores, guesses))


def gaussian_one_run_bound(scores: CanaryScores, claim: AuditClaim) -> float:
    """As :func:`one_run_bound`, for mechanisms known to be Gaussian, about which the same guesses say more.

    Mahloujifar, Melis and Chaudhuri (2024), https://arxiv.org/abs/2410.22235.
    """
    canaries, delta = len(scores.scores), float(claim.delta)

    def bound(guesses: int, right: int) -> float:
        return gaussian_one_run_epsilon(canaries=canaries, guesses=guesses, right=right, delta=delta)

    guesses = _best_guesses(canaries, claim, bound=bound)
    return bound(guesses, _right_guesses(scores, guesses))


def one_run_epsilon(*, canaries: int, guesses: int, right: int, delta: float) -> float:
    """The largest epsilon refuted at 5 % by ``right`` of ``guesses`` guesses; 0 if none is. Steinke et al. (2023)."""

    def excess(epsilon: float) -> float:
        chance = 1 / (1 + math.exp(-epsilon))
        tail = float(binom.sf(right - 1, guesses, chance))
        fewer = np.arange(1, right + 1)
        between = binom.sf(right - fewer - 1, guesses, chance) - tail
        slope = float(np.max(between / fewer, initial=0.0))
        return SIGNIFICANCE - min(1.0, tail + 2 * canaries * delta * slope)

    return _last_refuted(excess, largest=_LARGEST_EPSILON)


def gaussian_one_run_epsilon(*, canaries: int, guesses: int, right: int, delta: float) -> float:
    """As :func:`one_run_epsilon` for Gaussian mechanisms: the largest shift refuted, as epsilon at ``delta``.

    Mahloujifar et al. (2024), Algorithm 4 with two choices per canary; a single Gaussian release is exactly its shift.
    """

    def excess(shift: float) -> float:
        caught, missed = SIGNIFICANCE * right / canaries, SIGNIFICANCE * (guesses - right) / canaries
        for place in range(right - 1, -1, -1):
            grown = max(missed, float(ndtr(ndtri(caught) - shift)))
            if grown == missed:  # neither can change any more
                break
            caught = min(1.0, caught + place / (guesses - place) * (grown - missed))
            missed = grown
        return caught + missed - guesses / canaries

    return shift_epsilon(_last_refuted(excess, largest=_LARGEST_SHIFT), delta=delta)


def shift_epsilon(shift: float, *, delta: float) -> float:
    """The epsilon at ``delta`` of one Gaussian release that moves by ``shift`` standard deviations."""
    rho = Fraction(shift**2 / 2)

    def excess(epsilon: float) -> float:
        return gaussian_delta(epsilon, rho=rho) - delta

    if rho == 0 or excess(0.0) <= 0:
        return 0.0
    return _LARGEST_EPSILON if excess(_LARGEST_EPSILON) > 0 else float(brentq(excess, 0.0, _LARGEST_EPSILON))


def _last_refuted(excess: Callable[[float], float], *, largest: float) -> float:
    """Where ``excess``, which falls, passes zero from above; 0 if it starts below."""
    if excess(0.0) <= 0:
        return 0.0
    return largest if excess(largest) > 0 else float(brentq(excess, 0.0, largest, xtol=1e-6))


def _best_guesses(canaries: int, claim: AuditClaim, *, bound: Callable[[int, int], float]) -> int:
    """How many of the highest scores to guess: what gives most if the mechanism is exactly as claimed."""
    choices = [max(1, round(canaries * share)) for share in _GUESSED_SHARES]
    return max(choices, key=lambda guesses: bound(guesses, _expected_right(guesses, canaries, claim.shift)))


def _expected_right(guesses: int, canaries: int, shift: float) -> int:
    """How many of the ``guesses`` highest of ``canaries`` scores belong to canaries that took part, if all is well."""

    def excess(threshold: float) -> float:
        return float(ndtr(shift - threshold) + ndtr(-threshold)) / 2 - guesses / canaries

    threshold = brentq(excess, -40.0, shift + 40.0)
    return min(guesses, int(canaries * ndtr(shift - threshold) / 2))


def _right_guesses(scores: CanaryScores, guesses: int) -> int:
    highest = np.argsort(-scores.scores, kind="stable")[:guesses]
    return int(scores.included[highest].sum())
