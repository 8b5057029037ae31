"""How the coordinator gathers a total under masks: everybody commits, then everybody sends; or another attempt begins.

A site that vanishes ends its attempt within the stage's deadline, and the next goes on without it; for some stages
after that, it is not waited for. Nobody pays for an attempt to which somebody did not commit.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from fedgrade.aggregation.secure_sum.coordinator import SumCoordinator, propose
from fedgrade.aggregation.secure_sum.documents import SumTerms
from fedgrade.aggregation.secure_sum.evidence import SumEvidence
from fedgrade.errors import FedgradeError, RoundFailed
from fedgrade.federation.charging import Ask
from fedgrade.federation.exchange import RESENDS, Exchange, Received
from fedgrade.federation.gathered import Gathered
from fedgrade.federation.messages import (
    Asked,
    CommitRequest,
    Committed,
    ContributeRequest,
    Contribution,
    Opened,
    Refusal,
    Reply,
    Revealed,
    RevealRequest,
    Voted,
    VoteRequest,
)
from fedgrade.federation.payloads import read_masked
from fedgrade.federation.store import BegunSum, RunStore
from fedgrade.federation.sum_task import sum_task
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import Purpose

logger = logging.getLogger(__name__)

_LONGEST_REST = 16  # stages


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """Who answered a question as it should, who said that only a further attempt can succeed, who never answered."""

    good: set[SiteId] = field(default_factory=set)
    behind: set[SiteId] = field(default_factory=set)
    silent: set[SiteId] = field(default_factory=set)


class SumConversation:
    """The secure sums of one job, one stage after another."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        store: RunStore,
        share_keys: Mapping[SiteId, bytes],
        admit: Callable[[Collection[SiteId]], set[SiteId]],
    ) -> None:
        """Nothing is asked yet.

        Args:
            exchange: with whom, about which job.
            store: where an attempt is kept that sites may charge for.
            share_keys: what each site announced when it was admitted.
            admit: shows the job to sites once more, for a fresh share key after a restart.
        """
        self._exchange = exchange
        self._store = store
        self._share_keys = share_keys
        self._admit = admit
        self._stage = 0
        # Until which stage a site that vanished is left alone, and for how many stages that was.
        self._resting: dict[SiteId, tuple[int, int]] = {}

    def gather(self, purpose: Purpose, round_index: int, tensors: bytes) -> Gathered:
        """The total for one stage, of as many sites as last to its end.

        Raises:
            RoundFailed: fewer than ``aggregation.minimum_sites`` are left, or no attempt came to its end.
        """
        self._stage += 1
        what, failed = f"{purpose} round {round_index}", 0
        ask = Ask(job=self._exchange.job.digest, purpose=purpose, round_index=round_index, attempt=0)
        absent: set[SiteId] = set()
        begun = self._store.begun_sum(self._exchange.job, purpose=purpose, round_index=round_index)
        # One attempt for each that may turn out to be missing, and a few that a crash or a cheat may spoil.
        for _ in range(len(self._exchange.job.participants) + 1 + RESENDS):
            if begun is None:
                company = self._company(absent)
                self._exchange.require_enough(len(company), what=what)
                begun = self._begun(ask, company, digest(tensors), absent)
            if begun is not None:
                gathered = self._finished(begun, tensors, absent)
                if gathered is not None:
                    self._rest(absent, gathered.sites)
                    return gathered
                failed += 1
                ask = _after(ask, begun.terms.task.attempt)
            else:
                ask = _after(ask, ask.attempt)
            if failed > RESENDS:
                break
            begun = None
        raise RoundFailed(f"{what}: no attempt at the secure sum came to its end; the log says why each was given up")

    def _company(self, absent: Collection[SiteId]) -> tuple[SiteId, ...]:
        """Whom to propose a sum to: those who were there lately, or everybody if they are too few."""
        here = tuple(site for site in self._exchange.active if site not in absent)
        awake = tuple(site for site in here if self._resting.get(site, (0, 0))[0] < self._stage)
        return awake if len(awake) >= self._exchange.job.spec.aggregation.minimum_sites else here

    def _rest(self, absent: Collection[SiteId], present: Collection[SiteId]) -> None:
        """Leave those who vanished alone for a while, the longer the more often."""
        for site in present:
            self._resting.pop(site, None)
        for site in absent:
            stages = min(_LONGEST_REST, 2 * self._resting.get(site, (0, 0))[1] or 1)
            self._resting[site] = self._stage + stages, stages
            logger.warning("site %s: vanished; the next %d stages go on without it", site, stages)

    def _begun(
        self, ask: Ask, company: Collection[SiteId], weights_digest: str, absent: set[SiteId]
    ) -> BegunSum | None:
        """An attempt to which all of ``company`` committed, kept on disk; nothing if somebody did not."""
        task = sum_task(self._exchange.job, ask, weights_digest=weights_digest, participants=len(company))
        keys = {site: self._share_keys[site] for site in company if task.tolerated_dropouts}
        roster = self._exchange.witness.roster
        proposal = propose(task, company, roster=roster, share_keys=keys)
        total = SumCoordinator(proposal.terms, roster=roster)

        def accept(site: SiteId, reply: Opened[Reply]) -> bool:
            if not isinstance(reply.document.body, Committed):
                return False
            total.accept_commitment(site, reply.document.body.commitment.encode())
            return True

        bodies: dict[SiteId, Asked] = {site: CommitRequest(proposal=proposal) for site in company}
        answers = self._asked(bodies, accept, terms=proposal.terms)
        if answers.behind and task.tolerated_dropouts:
            # A restart loses the key under which others encrypt shares to a site.
            self._admit(answers.behind)
        absent |= answers.silent
        if answers.good != set(company):
            return None
        begun = BegunSum(terms=proposal.terms, commitments=total.signed["commitments"])
        # From here on sites may charge: a coordinator that dies can ask for the same again, byte for byte.
        self._store.keep_sum(begun)
        return begun

    def _finished(self, begun: BegunSum, tensors: bytes, absent: set[SiteId]) -> Gathered | None:
        """The total of the attempt ``begun``; nothing if it has to be given up."""
        if begun.terms.task.weights_digest != digest(tensors):
            return None
        total = SumCoordinator(begun.terms, roster=self._exchange.witness.roster)
        received: dict[SiteId, Received] = {}
        try:
            for site, raw in begun.commitments.items():
                total.accept_commitment(site, raw.encode())
            self._vectors(begun.terms, total, tensors, received, absent)
            if begun.terms.task.tolerated_dropouts:
                self._recover(begun.terms, total)
            result = total.total()
        except RoundFailed as error:
            logger.warning("attempt %d is given up: %s", begun.terms.task.attempt, error)
            return None
        return Gathered(
            result=result,
            attempt=begun.terms.task.attempt,
            received={site: received[site] for site in total.included},
            evidence=SumEvidence(terms=begun.terms, **total.signed),
        )

    def _vectors(
        self,
        terms: SumTerms,
        total: SumCoordinator,
        tensors: bytes,
        received: dict[SiteId, Received],
        absent: set[SiteId],
    ) -> None:
        """Second phase: everybody's masked vector."""
        task, job = terms.task, self._exchange.job
        body = ContributeRequest(
            purpose=task.purpose,
            round_index=task.round_index,
            attempt=task.attempt,
            commitments=total.commitments(),
        )
        read = partial(read_masked, job=job, purpose=task.purpose)

        def accept(site: SiteId, reply: Opened[Reply]) -> bool:
            one = self._exchange.received(site, reply, attempt=task.attempt, read=read)
            if one is None or not isinstance(reply.document.body, Contribution):
                return False
            total.accept_vector(site, reply.document.body.masked.encode(), one.release)
            received[site] = one
            return True

        answers = self._asked(dict.fromkeys(terms.participants, body), accept, terms=terms, tensors=tensors)
        absent |= answers.silent

    def _recover(self, terms: SumTerms, total: SumCoordinator) -> None:
        """Two more phases where dropouts are tolerated: all survivors sign who they are, then reveal."""

        def vote(site: SiteId, reply: Opened[Reply]) -> bool:
            if not isinstance(reply.document.body, Voted):
                return False
            total.accept_vote(site, reply.document.body.vote.encode())
            return True

        def reveal(site: SiteId, reply: Opened[Reply]) -> bool:
            if not isinstance(reply.document.body, Revealed):
                return False
            total.accept_shares(site, reply.document.body.shares.encode())
            return True

        survivors = total.survivors()
        self._asked(dict.fromkeys(survivors.survivors, VoteRequest(survivors=survivors)), vote, terms=terms)
        votes = total.votes()
        self._asked(dict.fromkeys(survivors.survivors, RevealRequest(votes=votes)), reveal, terms=terms)

    def _asked(
        self,
        bodies: Mapping[SiteId, Asked],
        accept: Callable[[SiteId, Opened[Reply]], bool],
        *,
        terms: SumTerms,
        tensors: bytes = b"",
    ) -> _Answers:
        """Ask, and ask the silent again, as long as the attempt can succeed and within its part of the deadline."""
        tolerated = terms.task.tolerated_dropouts
        phases = 4 if tolerated else 2
        patience = self._exchange.deadline_seconds / (phases * (1 + RESENDS))
        answers = _Answers()
        for _ in range(1 + RESENDS):
            waiting = {
                site: body
                for site, body in bodies.items()
                if site in self._exchange.active and site not in answers.good and site not in answers.behind
            }
            if not waiting or len(answers.behind) > tolerated:
                return answers
            for site, reply in self._exchange.ask(waiting, tensors=tensors, deadline_seconds=patience).items():
                if isinstance(reply.document.body, Refusal):
                    answers.behind.add(site)
                    continue
                try:
                    if accept(site, reply):
                        answers.good.add(site)
                except FedgradeError as error:
                    logger.warning("site %s: its part in the secure sum is discarded: %s", site, error)
        answers.silent.update(set(bodies) - answers.good - answers.behind)
        return answers


def _after(ask: Ask, attempt: int) -> Ask:
    return Ask(job=ask.job, purpose=ask.purpose, round_index=ask.round_index, attempt=attempt + 1)
