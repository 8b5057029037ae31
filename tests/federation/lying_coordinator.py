"""A coordinator that asks sites for whatever it likes in secure sums, properly signed, and keeps what it hears."""

from dataclasses import replace

from fedgrade.aggregation.secure_sum.coordinator import SumCoordinator, propose
from fedgrade.aggregation.secure_sum.documents import SumCommitments
from fedgrade.federation.charging import Ask
from fedgrade.federation.messages import CommitRequest, Committed, ContributeRequest, Contribution, Refusal, Request
from fedgrade.federation.payloads import read_masked
from fedgrade.federation.sum_task import sum_task
from fedgrade.trust.canonical import digest
from tests.federation.small_federation import zero_head
from tests.federation.sum_partners import FIVE, summing

ALL_OR_NOTHING = summing(minimum_sites=3)
RECOVERING = summing(minimum_sites=3, tolerate_dropouts=1)


class Coordinator:
    """Asks sites whatever it likes, properly signed, and keeps every byte that comes back."""

    def __init__(self, partners, spec=ALL_OR_NOTHING, *, participants=FIVE):
        self.partners, self.federation = partners, partners.federation
        keys = {site: self.federation.site_keys[site] for site in participants}
        self.job = replace(self.federation, site_keys=keys).job(spec)
        self.head, self.now, self.heard = zero_head(self.job), None, []
        admitted = {
            site: self.federation.opened(
                partners.answer(site, self.federation.admission(self.job, name=site)), name=site
            )
            for site in self.job.participants
        }
        self.share_keys = {site: reply.document.body.share_key.encode() for site, reply in admitted.items()}

    def message(self, site, body, tensors=b"", job=None):
        request = Request(site=site, job=job or self.job.digest, body=body, tensors_digest=digest(tensors))
        return self.federation.signed(request, tensors)

    def ask(self, site, body, tensors=b""):
        """The body of what ``site`` replies."""
        self.now = site, body
        self.heard.append(self.partners.answer(site, self.message(site, body, tensors)))
        return self.federation.opened(self.heard[-1], name=site).document.body

    def proposal(self, participants=FIVE, *, purpose="centre", round_index=0, attempt=0, head=None, **task):
        ask = Ask(job=self.job.digest, purpose=purpose, round_index=round_index, attempt=attempt)
        fitting = sum_task(self.job, ask, weights_digest=digest(head or self.head), participants=len(participants))
        changed = replace(fitting, **task)
        keys = {site: self.share_keys[site] for site in participants if changed.tolerated_dropouts}
        return propose(changed, participants, roster=self.federation.roster, share_keys=keys)

    def committed(self, proposal):
        """Everybody's honest commitment to ``proposal``."""
        said = {site: self.ask(site, CommitRequest(proposal=proposal)) for site in proposal.terms.participants}
        assert all(isinstance(body, Committed) for body in said.values()), said
        return SumCommitments(
            terms_digest=proposal.terms.digest, envelopes={site: body.commitment for site, body in said.items()}
        )

    def contribution(self, proposal, commitments, **changes):
        task = proposal.terms.task
        body = ContributeRequest(
            purpose=task.purpose, round_index=task.round_index, attempt=task.attempt, commitments=commitments
        )
        return replace(body, **changes)

    def total(self, proposal, commitments, *, keep_back=()):
        """The sum as an honest coordinator gathers it, with every vector but those it says never came."""
        total = SumCoordinator(proposal.terms, roster=self.federation.roster)
        for site, raw in commitments.envelopes.items():
            total.accept_commitment(site, raw.encode())
        total.commitments()
        for site in proposal.terms.participants:
            body = self.ask(site, self.contribution(proposal, commitments), self.head)
            assert isinstance(body, Contribution), body
            if site not in keep_back:
                tensors = self.federation.opened(self.heard[-1], name=site).tensors
                vector = read_masked(tensors, self.job, proposal.terms.task.purpose)
                total.accept_vector(site, body.masked.encode(), vector)
        return total

    def refused(self, site, body, code, reason, *, tensors=b""):
        """Return if ``site`` refuses with one clear error, and nothing was written in its ledger."""
        before = self.federation.ledger(site).read_bytes()
        said = self.ask(site, body, tensors)
        assert isinstance(said, Refusal), said
        assert said.code == code
        assert reason in said.reason
        assert self.federation.ledger(site).read_bytes() == before
