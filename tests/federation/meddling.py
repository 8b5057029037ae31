"""A cohort in which somebody changes what sites send, or keeps it back."""

from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.messages import Refusal, Reply, write_message
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.canonical import digest
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


def refused(federation, request, code):
    """The liar's signed refusal of ``request``."""
    body = Refusal(code=code, reason="no")
    reply = Reply(site=LIAR, request_digest=digest(request), body=body, tensors_digest=digest(b""))
    return write_message(reply, tensors=b"", key=federation.site_keys[LIAR])


def spent_once_admitted(federation):
    """Says, to every question but the first, that its answer was lost and another must be charged for."""

    def change(request, reply):
        admitted = federation.opened(reply, name=LIAR).document.body.kind == "admitted"
        return reply if admitted else refused(federation, request, "spent")

    return liar_alone(change)


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
