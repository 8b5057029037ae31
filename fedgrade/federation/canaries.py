"""Canaries through the path that real items take: :func:`compute_release`, from clip to noise, nothing rebuilt.

White box and best case for an attacker: every canary owns a direction, and everything the site released is seen. Needs
no photo and touches no ledger: nothing of a partner's is read, so nothing is charged.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedgrade.aggregation.mean import AggregationSpec
from fedgrade.data.manifest import Split
from fedgrade.errors import JobRefused
from fedgrade.federation.payloads import Head, read_release
from fedgrade.federation.releases import SiteRows, compute_release
from fedgrade.grading import GradeScale
from fedgrade.items import ItemBatch
from fedgrade.job import DataSpec, JobSpec, TrainingJob, plan_job
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, MIN_INPUT_SIZE, ModelSpec
from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.privacy.audit import AuditClaim, AuditReport, CanaryScores, audit
from fedgrade.privacy.noise import poisson_sample
from fedgrade.privacy.plan import LocalSpec
from fedgrade.trust.identity import SiteId, site_id
from fedgrade.trust.records import DiscreteGaussian

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
AuditedPurpose = Literal["centre", "train"]

# Canaries stand before the clip far outside it, and have one to three photos each: both must not matter.
_BEYOND_CLIP = 100.0
_PHOTOS = 3
_CENTRE_SHARE = 0.01
_SITES = 2


@dataclass(frozen=True, kw_only=True)
class CanaryTrial:
    """One kind of release of one job, asked for as often as its plan has it, with ``canaries`` canaries at most."""

    job: TrainingJob
    purpose: AuditedPurpose
    canaries: int

    def __post_init__(self) -> None:
        room = self.job.spec.model.feature_dimensions
        if self.canaries > room:
            raise JobRefused(f"audit: {self.canaries} canaries need a direction each; this job's features have {room}")
        if self.job.plan.mode == "local_sgd":
            raise JobRefused(
                "audit: privacy.mode local_sgd samples its batches and adds floating-point noise over several steps, "
                "so no canary has an exact score; audit a job in mode local or distributed"
            )

    @property
    def mechanism(self) -> DiscreteGaussian:
        """What one release is charged as."""
        mechanism = self.job.plan.mechanism(self.purpose)
        if not isinstance(mechanism, DiscreteGaussian):
            raise JobRefused(f"audit: a {mechanism.kind} mechanism has no exact canary scores")
        return mechanism

    @property
    def rounds(self) -> int:
        """How often the plan has this release."""
        return self.job.plan.rounds if self.purpose == "train" else 1

    @property
    def site(self) -> SiteId:
        """In whose place the releases are computed."""
        return self.job.participants[0]

    @property
    def claim(self) -> AuditClaim:
        """What one site's own releases of this kind cost, whoever sees them: with all other noise taken away."""
        return AuditClaim(
            epsilon=zcdp_epsilon(self.rounds * self.mechanism.rho, delta=self.job.plan.delta),
            delta=self.job.plan.delta,
            noise_multiplier=self.mechanism.scale / self.mechanism.sensitivity,
            rounds=self.rounds,
        )


def audit_releases(trial: CanaryTrial) -> AuditReport:
    """Run ``trial`` and say whether its canaries speak against what its releases are charged as.

    Raises:
        JobRefused: the job has fewer feature dimensions than canaries, or a mechanism without exact scores.
    """
    return audit(canary_scores(trial), trial.claim)


def canary_scores(trial: CanaryTrial) -> CanaryScores:
    """Scores of canaries, each taking part with probability 1/2, after all of the trial's releases."""
    included = poisson_sample(trial.canaries, rate=0.5)
    chosen = np.flatnonzero(included)
    thresholds, inputs = trial.job.head_shape()
    head = Head(thresholds=np.zeros((thresholds, inputs)), centre=np.zeros(inputs - 1))
    rows = _centre_rows(trial, chosen) if trial.purpose == "centre" else _training_rows(trial, chosen, head)
    directions = 1 if trial.purpose == "centre" else thresholds
    total = sum(_released(trial, head, rows) for _ in range(trial.rounds))
    # Fresh noise adds up in squares, the canaries' own part linearly: hence one square root for scores.
    scaled = np.asarray(total, dtype=np.float64).reshape(directions, -1)
    scaled /= trial.mechanism.scale * math.sqrt(trial.rounds)
    along = _rotation(directions) @ scaled
    return CanaryScores(
        scores=along[0, : trial.canaries],
        included=included,
        idle=np.concatenate([along[0, trial.canaries :], along[1:].ravel()]),
    )


def audit_job(*, epsilon: float, rounds: int) -> TrainingJob:
    """A job like a real one, of no data, that spends ``epsilon`` on ``rounds`` rounds: for audits of the code alone.

    Raises:
        PlanRefused: no noise gives that epsilon.
    """
    privacy = LocalSpec(
        target_epsilon=epsilon,
        delta=1e-5,
        evaluation_epsilon=1.0,
        centre_share=_CENTRE_SHARE,
        rounds=rounds,
        max_grad_norm=1.0,
    )
    spec = JobSpec(
        name="audit",
        data=DataSpec(asset_type="canary", test_fraction=0.5, synthetic_ceiling=0.0, minimum_items=2),
        model=ModelSpec(
            backbone="tf_efficientnet_lite0",
            input_size=MIN_INPUT_SIZE,
            pooling=("average",),
            weights_digest=LITE0_WEIGHTS_DIGEST,
        ),
        grading=GradeScale(
            name="audit", labels=("A", "B", "C"), critical=(), cost=((0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0))
        ),
        privacy=privacy,
        aggregation=AggregationSpec(learning_rate=1.0, momentum=0.0, average_last=0.5, minimum_sites=_SITES),
    )
    sites = {site_id(f"audit-{number}"): 1000 for number in range(_SITES)}
    return plan_job(spec, declared_items=sites, nonce="audit")


def _released(trial: CanaryTrial, head: Head, rows: SiteRows) -> npt.NDArray[np.int64]:
    def held(split: Split) -> SiteRows:
        del split
        return rows

    raw = compute_release(trial.job, trial.purpose, head, site=trial.site, rows=held)
    released = read_release(raw, trial.job, trial.purpose, site=trial.site)
    return np.asarray(released, dtype=np.int64)


def _centre_rows(trial: CanaryTrial, chosen: npt.NDArray[np.int64]) -> SiteRows:
    """Photos whose features are one axis each; scaled anyhow, because the sum is of unit features."""
    photos = 1 + chosen % _PHOTOS
    item_index = np.repeat(np.arange(len(chosen)), photos)
    features = np.zeros((len(item_index), trial.job.spec.model.feature_dimensions))
    features[np.arange(len(item_index)), chosen[item_index]] = _BEYOND_CLIP
    return SiteRows(features=features, item_index=item_index, grades=np.zeros(len(chosen), dtype=np.int64))


def _training_rows(trial: CanaryTrial, chosen: npt.NDArray[np.int64], head: Head) -> SiteRows:
    """Items whose gradient at weights of zero is along one input, equally at every threshold.

    Features of a photo could not do that, for the head sees a constant beside them: the canaries are what it would see.
    """
    photos, inputs = 1 + chosen % _PHOTOS, trial.job.head_shape()[1]
    shown = np.arange(_PHOTOS) < photos[:, None]
    batch = ItemBatch(
        inputs=np.zeros((len(chosen), _PHOTOS, inputs)),
        photo_weights=np.where(shown, 1.0 / photos[:, None], 0.0),
        grades=np.zeros(len(chosen), dtype=np.int64),
    )
    items, photo = np.nonzero(shown)
    batch.inputs[items, photo, chosen[items]] = _BEYOND_CLIP * trial.job.plan.max_grad_norm
    rows = _centre_rows(trial, chosen)
    rows.batches[head.centre.tobytes()] = batch
    return rows


def _rotation(directions: int) -> FloatArray:
    """An orthonormal basis [directions, directions] whose first row has all entries alike and positive."""
    basis = np.eye(directions)
    basis[:, 0] = 1.0
    orthonormal = np.linalg.qr(basis).Q.T
    return np.asarray(orthonormal * np.sign(orthonormal[0, 0]), dtype=np.float64)
