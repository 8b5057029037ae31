"""Canaries through ``local_sgd`` as a site runs it: Poisson batches, Opacus' clip, floating-point noise, many steps.

Canaries enter as a site's own photos do, features of one axis each. The learning rate is so small that weights never
leave zero, where every canary's gradient is longer than the clip whatever steps went before; it scales canaries and
noise alike, and hides neither. A canary's score is the sum of all updates along its axis, in units of all steps' noise:
N(0, 1) for those that did not take part, and for those that did, ``rate * sqrt(steps) / noise multiplier`` higher on
average (times the part of the clipped gradient that lies along the axis; the constant bias feature has the rest).
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedgrade.aggregation.mean import AggregationSpec
from fedgrade.federation.payloads import Head, read_release
from fedgrade.federation.releases import SiteRows, compute_release
from fedgrade.grading import GradeScale
from fedgrade.job import DataSpec, JobSpec, TrainingJob, plan_job
from fedgrade.model.head import BIAS_FEATURE
from fedgrade.model.spec import ModelSpec
from fedgrade.privacy.accounting import poisson_epsilon
from fedgrade.privacy.audit import AuditClaim, CanaryScores, Check, deviation_check, one_run_bound, shift_check
from fedgrade.privacy.noise import poisson_sample
from fedgrade.privacy.plan import LocalSgdSpec
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import PoissonGaussian

SITE = SiteId("site-a")
AXES = 1280
ALONG_AXIS = 1 / math.sqrt(1 + BIAS_FEATURE**2)
_CLIP = 0.25  # half a unit input is longer
_LEARNING_RATE = 1e-9
_DECLARED = 600


@dataclass(frozen=True, kw_only=True)
class SgdFindings:
    """Three checks of a run of ``local_sgd``, and the claim they are about."""

    claim: AuditClaim
    shift: Check
    deviation: Check
    lower_bound: Check

    @property
    def failed(self) -> set[str]:
        """Names of the checks that speak against the claim."""
        return {check.name for check in (self.shift, self.deviation, self.lower_bound) if not check.passed}


def sgd_job(
    *, epsilon: float, rate: float, rounds: int, local_steps: int, trainable: Literal["head", "adapter"] = "head"
) -> TrainingJob:
    """A job in mode ``local_sgd`` whose training costs ``epsilon`` but for a hundredth of it."""
    privacy = LocalSgdSpec(
        target_epsilon=epsilon, delta=1e-5, evaluation_epsilon=1.0, centre_share=0.01, rounds=rounds,
        max_grad_norm=_CLIP, sampling_rate=rate, local_steps=local_steps, learning_rate=_LEARNING_RATE,
    )  # fmt: skip
    spec = JobSpec(
        name="audit",
        data=DataSpec(asset_type="panel", test_fraction=0.2, synthetic_ceiling=0.0, minimum_items=2),
        model=ModelSpec(
            backbone="tf_efficientnet_lite0",
            input_size=224,
            pooling=("average",),
            weights_digest="a" * 64,
            trainable=trainable,
        ),
        grading=GradeScale(name="two", labels=("A", "B"), critical=(), cost=((0.0, 1.0), (1.0, 0.0))),
        privacy=privacy,
        aggregation=AggregationSpec(learning_rate=1.0, momentum=0.0, average_last=1.0, minimum_sites=2),
    )
    return plan_job(spec, declared_items={SITE: _DECLARED, SiteId("site-b"): _DECLARED}, nonce="audit")


def sgd_claim(job: TrainingJob, *, noise_factor: int = 1) -> AuditClaim:
    """What all training rounds of ``job`` are charged as, and the shift of scores that goes with it.

    A ``noise_factor`` above 1 claims so many times the noise: a boast, for the audit to notice.
    """
    mechanism = _mechanism(job)
    rate, noise = mechanism.sampling_rate, noise_factor * mechanism.noise_multiplier
    steps, delta = mechanism.steps * job.plan.rounds, job.plan.delta
    return AuditClaim(
        epsilon=poisson_epsilon({(rate, noise): steps}, delta=delta),
        delta=delta,
        noise_multiplier=float(noise / rate) / ALONG_AXIS,
        rounds=steps,
    )


def sgd_scores(job: TrainingJob, *, canaries: int) -> CanaryScores:
    """Scores of canaries, each taking part in the job with probability 1/2, after all of its training rounds."""
    included = poisson_sample(canaries, rate=0.5)
    rows = _canary_rows(np.flatnonzero(included))
    total = sum(_update(job, rows) for _ in range(job.plan.rounds))
    mechanism = _mechanism(job)
    batch = round(_DECLARED * Fraction(mechanism.sampling_rate))
    # A step takes learning rate times noisy sum, over the expected batch, off the weights.
    step = _LEARNING_RATE * job.plan.max_grad_norm * float(mechanism.noise_multiplier) / batch
    along = -np.asarray(total) / (step * math.sqrt(mechanism.steps * job.plan.rounds))
    # The head's constant bias feature, after the axes, is pulled by all canaries; an adapter's numbers by none: at
    # thresholds of zero, nothing of the loss comes through to it.
    idle = np.concatenate([along[canaries:AXES], along[AXES + 1 :]])
    return CanaryScores(scores=along[:canaries], included=included, idle=idle)


def judged(scores: CanaryScores, claim: AuditClaim) -> SgdFindings:
    """``scores`` held against ``claim``; the bound is the one that holds for any mechanism (Steinke et al. 2023).

    That for Gaussian mechanisms would not do: sampled steps are not one.
    """
    lower = Check(name="lower bound", measured=one_run_bound(scores, claim), lowest=0.0, highest=claim.epsilon)
    return SgdFindings(
        claim=claim, shift=shift_check(scores, claim), deviation=deviation_check(scores), lower_bound=lower
    )


def _mechanism(job: TrainingJob) -> PoissonGaussian:
    mechanism = job.plan.train
    assert isinstance(mechanism, PoissonGaussian)
    return mechanism


def _canary_rows(axes: npt.NDArray[np.int64]) -> SiteRows:
    features = np.zeros((len(axes), AXES))
    features[np.arange(len(axes)), axes] = 7.0
    return SiteRows(features=features, item_index=np.arange(len(axes)), grades=np.zeros(len(axes), dtype=np.int64))


def _update(job: TrainingJob, rows: SiteRows) -> npt.NDArray[np.float64]:
    head = Head.of(job, np.zeros(job.parameters), np.zeros(AXES))
    raw = compute_release(job, "train", head, site=SITE, rows=lambda _: rows)
    return np.asarray(read_release(raw, job, "train", site=SITE), dtype=np.float64)
