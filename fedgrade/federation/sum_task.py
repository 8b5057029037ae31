"""What an attempt at a secure sum is about: coordinator and sites work it out alike, from the sealed job."""

from fedgrade.aggregation.secure_sum.documents import SumTask
from fedgrade.aggregation.secure_sum.site import SumFloor
from fedgrade.federation.charging import Ask
from fedgrade.federation.payloads import largest_release, release_size
from fedgrade.federation.policy import Policy
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import digest, encode


def sums(job: TrainingJob) -> bool:
    """Whether sites' releases in ``job`` are added up under masks."""
    return job.spec.aggregation.method == "secure_sum"


def sum_task(job: TrainingJob, ask: Ask, *, weights_digest: str, participants: int) -> SumTask:
    """What ``participants`` sites add up for ``ask`` of ``job``, shown weights with this digest.

    The smaller the set, the fewer of it may vanish: what is left must bring the noise that the plan counts on, and be
    as many as the job asks for.
    """
    aggregation = job.spec.aggregation
    spare = min((participants - 1) // 3, participants - max(job.noise_shares, aggregation.minimum_sites))
    return SumTask(
        job=job.digest,
        purpose=ask.purpose,
        round_index=ask.round_index,
        attempt=ask.attempt,
        weights_digest=weights_digest,
        plan_digest=digest(encode(job.plan)),
        size=release_size(job, ask.purpose),
        # One for all: how large a site is says nothing more than it declared, but the terms are the same for everybody.
        entry_limit=max(largest_release(job, ask.purpose, site=site) for site in job.participants),
        tolerated_dropouts=max(0, min(aggregation.tolerate_dropouts, spare)),
    )


def sum_floor(job: TrainingJob, policy: Policy) -> SumFloor:
    """What a site with ``policy`` insists on before it adds its release to others' in ``job``."""
    return SumFloor(minimum_participants=policy.minimum_participants, noise_shares=job.noise_shares)
