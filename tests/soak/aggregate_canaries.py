"""Canaries of one site, seen by someone who is shown nothing but the sum of all sites' releases.

The other sites have no items: whoever attacks is supposed to know them all and to take their part out of the sum, so
that their noise is all that is left of them.
"""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np

from fedgrade.aggregation.mean import sum_of_releases
from fedgrade.federation import canaries
from fedgrade.federation.canaries import CanaryTrial
from fedgrade.federation.payloads import Head, read_release
from fedgrade.federation.releases import SiteRows, compute_release
from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.privacy.audit import AuditClaim, CanaryScores
from fedgrade.privacy.noise import poisson_sample
from fedgrade.trust.identity import SiteId


def aggregate_claim(trial: CanaryTrial) -> AuditClaim:
    """What the releases of ``trial`` cost in the eyes of someone who sees their sum over all participants alone."""
    sites = len(trial.job.participants)
    return replace(
        trial.claim,
        epsilon=zcdp_epsilon(Fraction(trial.rounds * trial.mechanism.rho, sites), delta=trial.job.plan.delta),
        noise_multiplier=trial.claim.noise_multiplier * math.sqrt(sites),
    )


def aggregate_scores(trial: CanaryTrial) -> CanaryScores:
    """Scores of the first site's canaries along the sum of what all participants release."""
    included = poisson_sample(trial.canaries, rate=0.5)
    thresholds, inputs = trial.job.head_shape()
    head = Head(thresholds=np.zeros((thresholds, inputs)), centre=np.zeros(inputs - 1))
    chosen, nobody = np.flatnonzero(included), np.empty(0, dtype=np.int64)
    rows = {site: canaries._training_rows(trial, nobody, head) for site in trial.job.participants}
    rows[trial.site] = canaries._training_rows(trial, chosen, head)
    total = sum(_summed(trial, head, rows).astype(np.float64) for _ in range(trial.rounds))
    scale = trial.mechanism.scale * math.sqrt(trial.rounds * len(trial.job.participants))
    along = canaries._rotation(thresholds) @ (np.asarray(total).reshape(thresholds, -1) / scale)
    return CanaryScores(
        scores=along[0, : trial.canaries],
        included=included,
        idle=np.concatenate([along[0, trial.canaries :], along[1:].ravel()]),
    )


def _summed(trial: CanaryTrial, head: Head, rows: dict[SiteId, SiteRows]) -> np.ndarray:
    released = []
    for site, held in rows.items():
        raw = compute_release(trial.job, trial.purpose, head, site=site, rows=lambda _, held=held: held)
        released.append(read_release(raw, trial.job, trial.purpose, site=site))
    return sum_of_releases(released)
