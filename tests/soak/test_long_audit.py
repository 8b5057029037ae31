"""Audits with 5,000 canaries: what a white-box observer finds in releases, and that mechanisms gone wrong are found.

A head has no room for 5,000 directions. Canaries are dealt to several runs instead, each in one run alone: all runs
together are then as private for each of them as one, and the lower bounds hold for all scores together.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from fedgrade import training
from fedgrade.federation import releases
from fedgrade.federation.canaries import CanaryTrial, audit_job, canary_scores
from fedgrade.job import plan_job
from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.privacy.audit import AuditClaim, CanaryScores, audit, deviation_check, shift_check
from fedgrade.privacy.plan import DistributedSpec
from fedgrade.trust.identity import site_id
from tests.privacy.sgd_canaries import judged, sgd_claim, sgd_job, sgd_scores
from tests.soak.aggregate_canaries import aggregate_claim, aggregate_scores

pytestmark = pytest.mark.slow

RUNS, CANARIES = 4, 1250
EPSILON, ROUNDS, SITES = 8.0, 20, 5
SGD_EPSILON = 8.0
BOAST = ", twice the noise claimed"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the figures."""

    name: str
    claim: AuditClaim
    checks: dict
    flagged: set


def in_several_runs(scores_of):
    """Scores of all canaries, each from the one run that it was dealt to."""
    runs = [scores_of() for _ in range(RUNS)]
    return CanaryScores(
        scores=np.concatenate([run.scores for run in runs]),
        included=np.concatenate([run.included for run in runs]),
        idle=np.concatenate([run.idle for run in runs]),
    )


def local_trial():
    return CanaryTrial(job=audit_job(epsilon=EPSILON, rounds=ROUNDS), purpose="train", canaries=CANARIES)


def aggregate_trial(*, distributed):
    """The same job among more sites, in mode ``local`` or with shares of noise and a floor under them."""
    spec = audit_job(epsilon=EPSILON, rounds=ROUNDS).spec
    if distributed:
        shared = {name: getattr(spec.privacy, name) for name in (
            "target_epsilon", "delta", "evaluation_epsilon", "centre_share", "rounds", "max_grad_norm",
        )}  # fmt: skip
        spec = replace(
            spec,
            privacy=DistributedSpec(floor_epsilon=3 * EPSILON, **shared),
            # All must answer, so that each adds the least: its share of the noise alone.
            aggregation=replace(spec.aggregation, method="secure_sum", minimum_sites=SITES),
        )
    sites = {site_id(f"audit-{number}"): 1000 for number in range(SITES)}
    return CanaryTrial(job=plan_job(spec, declared_items=sites, nonce="audit"), purpose="train", canaries=CANARIES)


def line(name, scores, claim):
    report = audit(scores, claim)
    bounds = {"Steinke": report.bound, "f-DP": report.gaussian_bound}
    return Line(name=name, claim=claim, checks={**_measured(report.checks), **bounds}, flagged=_names(report.failed))


def sgd_line(name, scores, claim):
    found = judged(scores, claim)
    checks = _measured((found.shift, found.deviation)) | {"Steinke": found.lower_bound.measured, "f-DP": None}
    return Line(name=name, claim=claim, checks=checks, flagged=found.failed)


def _measured(checks):
    return {check.name: check.measured for check in checks}


def _names(checks):
    return {check.name for check in checks}


def halve_integer_noise(patch):
    draw = releases.discrete_gaussian
    patch.setattr(releases, "discrete_gaussian", lambda size, *, scale: draw(size, scale=max(1, scale // 2)))


def halve_floating_noise(patch):
    draw = training.floating_gaussian
    patch.setattr(training, "floating_gaussian", lambda size, *, scale: draw(size, scale=scale / 2))


def twice_the_noise(scores, claim, *, epsilon):
    """The same releases under a claim of twice their noise: scores are in units of the noise that is claimed."""
    halved = CanaryScores(scores=scores.scores / 2, included=scores.included, idle=scores.idle / 2)
    return halved, replace(claim, noise_multiplier=2 * claim.noise_multiplier, epsilon=epsilon)


def quarter_of_rho(claim):
    """The epsilon of integer noise twice as large."""
    return zcdp_epsilon(Fraction((claim.shift / 2) ** 2 / 2), delta=claim.delta)


def audited():
    """Every view of the mechanisms as they are, and the same under a claim that says too much."""
    trials = {
        "`local`, one site's own releases": (local_trial(), canary_scores, local_trial().claim),
        f"`local`, sum over {SITES} sites": aggregated(distributed=False),
        f"`distributed`, sum over {SITES} sites": aggregated(distributed=True),
    }
    for name, (trial, scores_of, claim) in trials.items():
        scores = in_several_runs(partial(scores_of, trial))
        boasted = twice_the_noise(scores, claim, epsilon=quarter_of_rho(claim))
        yield line(name, scores, claim), line(name + BOAST, *boasted)
    for trainable in ("head", "adapter"):
        job, name = long_sgd_job(trainable=trainable), f"`local_sgd` of the {trainable}, one site's own updates"
        scores = in_several_runs(partial(sgd_scores, job, canaries=CANARIES))
        boasted = twice_the_noise(scores, sgd_claim(job), epsilon=sgd_claim(job, noise_factor=2).epsilon)
        yield sgd_line(name, scores, sgd_claim(job)), sgd_line(name + BOAST, *boasted)


def aggregated(*, distributed):
    trial = aggregate_trial(distributed=distributed)
    return trial, aggregate_scores, aggregate_claim(trial)


def long_sgd_job(*, trainable="head"):
    return sgd_job(epsilon=SGD_EPSILON, rate=0.25, rounds=5, local_steps=16, trainable=trainable)


def mutants(monkeypatch):
    """Half of the noise, in each kind of mechanism."""
    local, sgd = local_trial(), long_sgd_job()
    with monkeypatch.context() as patch:
        halve_integer_noise(patch)
        yield line("`local`, noise halved", in_several_runs(partial(canary_scores, local)), local.claim)
    with monkeypatch.context() as patch:
        halve_floating_noise(patch)
        scores = in_several_runs(partial(sgd_scores, sgd, canaries=CANARIES))
        yield sgd_line("`local_sgd`, noise halved", scores, sgd_claim(sgd))


def test_no_evidence_against_any_mechanism_and_evidence_against_each_that_went_wrong(monkeypatch, publish):
    pairs = list(audited())
    sound, wrong = [pair[0] for pair in pairs], [pair[1] for pair in pairs] + list(mutants(monkeypatch))
    publish("audit", figures(sound + wrong))
    for one in sound:
        assert not one.flagged, one
        assert one.checks["Steinke"] > 0, "the bound sees something at this size"
    for one in wrong:
        assert "standard deviation" in one.flagged, one


def test_halved_noise_is_far_beyond_chance_at_this_size():
    """Half the noise moves the check six times as far as chance is allowed to."""
    rng = np.random.default_rng(0)
    included = rng.random(RUNS * CANARIES) < 0.5
    claim = local_trial().claim
    noise = rng.normal(size=len(included)) / 2
    scores = CanaryScores(scores=noise + claim.shift * included, included=included, idle=np.empty(0))
    check = deviation_check(scores)
    assert check.lowest - check.measured > 5 * (check.highest - 1)
    assert shift_check(scores, claim).passed


def figures(lines):
    setup = (
        f"{RUNS * CANARIES} canaries, each in one of {RUNS} runs and in it with probability 1/2, through "
        "`compute_release` as a site calls it; the observer is shown every release and every canary's direction. "
        "Training rounds alone; delta 1e-5. Mean shift as measured and as claimed; standard deviation of the noise, 1 "
        "if all is well; lower bounds on epsilon at 95 % confidence (Steinke et al. 2023 for any mechanism; "
        "Mahloujifar et al. 2024 for Gaussian ones, which sampled steps are not)."
    )
    table = [setup, "", "| audited | ε claimed | shift | deviation | Steinke | f-DP | evidence against the claim |"]
    table.append("|---|---|---|---|---|---|---|")
    for one in lines:
        gaussian = "" if one.checks["f-DP"] is None else f"{one.checks['f-DP']:.2f}"
        table.append(
            f"| {one.name} | {one.claim.epsilon:.2f} | {one.checks['mean shift']:.3f} of {one.claim.shift:.3f} | "
            f"{one.checks['standard deviation']:.4f} | {one.checks['Steinke']:.2f} | {gaussian} | "
            f"{', '.join(sorted(one.flagged)) or 'none'} |"
        )
    return table
