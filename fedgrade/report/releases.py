"""What left the sites in one job: which mechanism, how much noise, how often."""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

from fedgrade.federation.payloads import release_size
from fedgrade.federation.sum_task import sums
from fedgrade.federation.verification import FederationProof, JobProof
from fedgrade.report.words import noise_text, rho_text
from fedgrade.trust.records import DiscreteGaussian, PoissonGaussian, Purpose

PURPOSES: tuple[Purpose, ...] = ("centre", "train", "evaluate")
_TITLES: dict[Purpose, str] = {"centre": "Feature centre", "train": "Training round", "evaluate": "Evaluation"}
_WHAT: dict[Purpose, str] = {
    "centre": "Sum of unit-length feature vectors",
    "train": "Sum of clipped gradients",
    "evaluate": "Confusion counts on held-out items",
}
_LOCAL_STEPS = "Update after local DP-SGD steps"
_MASKED = "under masks: the coordinator reads the total alone"
_AS_IT_IS = "as it is: the coordinator reads each"


@dataclass(frozen=True, kw_only=True)
class ReleaseRow:
    """One kind of release and the noise that goes with it; texts, ready to print."""

    title: str
    what: str
    times: str
    numbers: str
    mechanism: str
    noise: str
    sensitivity: str
    scale: str
    noise_multiplier: str
    clip_norm: str
    cost: str
    travels: str


def release_rows(job: JobProof, proof: FederationProof) -> tuple[ReleaseRow, ...]:
    """The job's three kinds of release, whether or not they came to pass."""
    return tuple(_release_row(purpose, job, proof) for purpose in PURPOSES)


def _release_row(purpose: Purpose, job: JobProof, proof: FederationProof) -> ReleaseRow:
    plan = job.job.plan
    mechanism = plan.mechanism(purpose)
    size = release_size(job.job, purpose)
    match mechanism:
        case DiscreteGaussian():
            return ReleaseRow(
                title=_TITLES[purpose],
                what=_WHAT[purpose],
                times=_times(purpose, job, proof),
                numbers=f"{size:,}",
                mechanism="Gaussian, full batch",
                noise="exact: integers from a discrete Gaussian",
                sensitivity=f"{mechanism.sensitivity:,}",
                scale=f"{mechanism.scale:,}",
                noise_multiplier=noise_text(Fraction(mechanism.scale, mechanism.sensitivity)),
                clip_norm=f"{plan.max_grad_norm:g}" if purpose == "train" else "1",
                cost=rho_text(mechanism.rho),
                travels=_MASKED if sums(job.job) else _AS_IT_IS,
            )
        case PoissonGaussian():
            rate = float(mechanism.sampling_rate)
            return ReleaseRow(
                title=_TITLES[purpose],
                what=_LOCAL_STEPS,
                times=_times(purpose, job, proof),
                numbers=f"{size:,}",
                mechanism=f"Gaussian, {mechanism.steps:,} Poisson batches at rate {rate:g}",
                noise="floating point: approximates the Gaussian that is accounted for",
                sensitivity=f"{plan.max_grad_norm:g}",
                scale=f"{float(mechanism.noise_multiplier) * plan.max_grad_norm:.4g}",
                noise_multiplier=noise_text(mechanism.noise_multiplier),
                clip_norm=f"{plan.max_grad_norm:g}",
                cost="composed numerically",
                travels=_AS_IT_IS,
            )
        case _:
            assert_never(mechanism)


def smallest_scale(job: JobProof) -> int:
    """The least scale of integer noise in the training stages, in grid steps."""
    plan = job.job.plan
    return min(mechanism.scale for mechanism in (plan.centre, plan.train) if isinstance(mechanism, DiscreteGaussian))


def uses_floating_point(job: JobProof) -> bool:
    """Whether any release of ``job`` carries floating-point noise."""
    return isinstance(job.job.plan.train, PoissonGaussian)


def _times(purpose: Purpose, job: JobProof, proof: FederationProof) -> str:
    """How often one site was charged for this: one number if all sites agree, else the least and the most."""
    charged = Counter(
        site
        for site, ledger in proof.sites.items()
        for charge in ledger.charges.values()
        if charge.reserve.job == job.job.digest and charge.reserve.purpose == purpose
    )
    counts = sorted(charged[site] for site in proof.sites if site in job.job.declared_items)
    if not counts:
        return "0"
    return f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
