"""A cohort in which somebody changes what sites send, or keeps it back."""

from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.verification import verify_federation
from tests.federation.small_federation import NAMES

LIAR = NAMES[2]
HONEST = NAMES[:2]


class Meddled:
    """A cohort in which ``meddle(site, request, reply)`` has the last word; None is silence."""

    def __init__(self, sites, meddle):
        self.inner = InProcessCohort(sites=sites)
        self.meddle = meddle
        self.asked = []

    def ask(self, requests, *, deadline_seconds):
        self.asked.append(dict(requests))
        replies = self.inner.ask(requests, deadline_seconds=deadline_seconds)
        meddled = {site: self.meddle(site, requests[site], reply) for site, reply in replies.items()}
        return {site: reply for site, reply in meddled.items() if reply is not None}


def liar_alone(change):
    """Meddles with what one site sends and lets the others be."""
    return lambda site, request, reply: change(request, reply) if site == LIAR else reply


def run(federation, job, meddle, **settings):
    with federation.answers(**settings) as answers:
        cohort = Meddled(answers, meddle)
        federation.run(job, cohort)
    return cohort


def trained_without(federation, job, meddle, **settings):
    """The job ran to its end, and the liar's releases are nowhere in it."""
    run(federation, job, meddle, **settings)
    release = federation.release(job).release
    assert set(release.contributions) == set(HONEST)
    verify_federation(federation.root)
    return release
