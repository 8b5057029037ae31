"""What the jobs and the partners of the faults are like: tiny, and with budget for hundreds of jobs."""

from dataclasses import replace

from tests.federation.small_federation import POLICY, SPEC
from tests.federation.sum_partners import summing

PATIENT = replace(POLICY, modes=("local", "distributed"), epsilon_per_job=60.0, epsilon_limit=1e6)
ROUNDS = SPEC.privacy.rounds


def plain(sites):
    """A job of so many sites; nothing is closed without everybody, so that there is one right model."""
    return replace(SPEC, aggregation=replace(SPEC.aggregation, minimum_sites=sites))


def summed(sites):
    """The same under masks, all or nothing."""
    return summing(rounds=ROUNDS, minimum_sites=sites)


def recovering(sites):
    """The same; the sum does without one site that vanishes after it committed."""
    return summing(rounds=ROUNDS, minimum_sites=sites - 1, tolerate_dropouts=1)
