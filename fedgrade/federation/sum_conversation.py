"""How the coordinator gathers a total under masks: everybody commits, then everybody sends; or another attempt begins.

A site that vanishes ends its attempt within the stage's deadline, and the next goes on without it; for some stages
after that, it is not waited for. Nobody pays for an attempt to which somebody did not commit. A site that ends attempts
which others paid for is left alone the longer, whether it lies or is only unlucky.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from fedgrade.aggregation.secure_sum.coordinator import SumCoordinator, propose
from fedgrade.aggregation.secure_sum.documents import SumSurvivors, SumTerms, SumVotes
from fedgrade.aggregation.secure_sum.evidence import SumEvidence
from fedgrade.errors import FedgradeError, RoundFailed, StoreUnavailable
from fedgrade.federation.charging import Ask
from fedgrade.federation.exchange import PASSING, Exchange, Received
from fedgrade.federation.gathered import Gathered
from fedgrade.federation.messages import (
    Asked,
    CommitRequest,
    Committed,
    ContributeRequest,
    Contribution,
    Opened,
    Refusal,
    RefusalCode,
    Reply,
    Revealed,
    RevealRequest,
    Voted,
    VoteRequest,
)
from fedgrade.federation.payloads import read_masked
from fedgrade.federation.resting import Resting
from fedgrade.federation.store import BegunSum, RunStore
from fedgrade.federation.sum_task import sum_task
from fedgrade.federation.turns import RESENDS, Turns
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import Purpose

logger = logging.getLogger(__name__)

_NAMED = 3  # sites in one line about an attempt
# A site whose policy asks for more company may be asked again when others are back.
_PASSING: frozenset[RefusalCode] = PASSING | frozenset[RefusalCode]({"policy"})
# A restart makes a site stumble at most twice: over an attempt that others paid for, and over its lost share key.
_PAID_STUMBLE, _FREE_STUMBLE, _TOO_MANY_STUMBLES = 2, 1, 4


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One stage's attempts so far.

    Attributes:
        what: its name in messages.
        ask: its place in the job; each attempt has its own number.
        tensors: the arrays that sites are shown.
        absent: who is left out from here on, and why.
        stumbles: by site, how often it could not go on; twice where others had paid.
        costly: who was missing from an attempt that others had paid for in vain.
        given_up: why such attempts came to nothing.
        said: by site, what was last heard of it if it was nothing good.
    """

    what: str
    ask: Ask
    tensors: bytes
    absent: set[SiteId] = field(default_factory=set)
    stumbles: Counter[SiteId] = field(default_factory=Counter)
    costly: set[SiteId] = field(default_factory=set)
    given_up: list[str] = field(default_factory=list)
    said: dict[SiteId, str] = field(default_factory=dict)

    def note(self, answers: "_Answers", *, in_vain: bool) -> None:
        """Whoever is lost is left out of further attempts; whoever stumbles may try again, but not for ever.

        ``in_vain`` says that others paid for an attempt of which nothing came.
        """
        self.said.update(answers.behind | answers.lost)
        self.absent.update(answers.lost)
        for site in answers.behind:
            self.stumbles[site] += _PAID_STUMBLE if in_vain else _FREE_STUMBLE
            if self.stumbles[site] >= _TOO_MANY_STUMBLES:
                self.absent.add(site)
        if in_vain:
            self.costly.update(answers.lost, answers.behind)

    @property
    def missing(self) -> dict[SiteId, str]:
        """Who is left out, and why."""
        return {site: self.said[site] for site in sorted(self.absent)}


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """Who answered a question as it should; who said that only a further attempt can succeed; who did neither."""

    good: set[SiteId] = field(default_factory=set)
    behind: dict[SiteId, str] = field(default_factory=dict)
    lost: dict[SiteId, str] = field(default_factory=dict)

    def __contains__(self, site: SiteId) -> bool:
        return site in self.good or site in self.behind or site in self.lost


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
        self._resting = Resting()

    def gather(self, purpose: Purpose, round_index: int, tensors: bytes) -> Gathered:
        """The total for one stage, of as many sites as last to its end.

        Raises:
            RoundFailed: fewer than ``aggregation.minimum_sites`` are left, or no attempt came to its end; names why.
        """
        self._resting.next_stage()
        ask = Ask(job=self._exchange.job.digest, purpose=purpose, round_index=round_index, attempt=0)
        stage = _Stage(what=f"{purpose} round {round_index}", ask=ask, tensors=tensors)
        begun = self._store.begun_sum(self._exchange.job, purpose=purpose, round_index=round_index)
        # Numbers that a crash left behind are not used again: sites would say each time that they are.
        attempt = begun.terms.task.attempt + 1 if begun is not None else 0
        gathered = self._finished(begun, stage) if begun is not None and begun.commitments else None
        # Ends, for each further attempt was paid for, or has left out or counted against some site.
        while gathered is None:
            if len(stage.given_up) > RESENDS:
                raise RoundFailed(f"{stage.what}: no attempt came to its end: {'; '.join(stage.given_up)}")
            begun = self._begun(stage, attempt)
            gathered = self._finished(begun, stage) if begun is not None else None
            attempt += 1
        self._rest(stage, gathered.sites)
        return gathered

    def _company(self, absent: Collection[SiteId]) -> tuple[SiteId, ...]:
        """Whom to propose a sum to: those who were there lately, or everybody if they are too few."""
        here = tuple(site for site in self._exchange.active if site not in absent)
        return self._resting.awake(here, at_least=self._exchange.job.spec.aggregation.minimum_sites)

    def _rest(self, stage: _Stage, present: Collection[SiteId]) -> None:
        """Leave those who vanished alone for a while."""
        for site in present:
            self._resting.back(site)
        for site, why in stage.missing.items():
            self._resting.vanished(site, why, costly=site in stage.costly)

    def _begun(self, stage: _Stage, attempt: int) -> BegunSum | None:
        """An attempt to which everybody in it committed, kept on disk; nothing if somebody did not.

        Raises:
            RoundFailed: too few are left to ask.
        """
        company = self._company(stage.absent)
        self._exchange.require_enough(company, what=stage.what, missing=stage.missing)
        ask = replace(stage.ask, attempt=attempt)
        task = sum_task(self._exchange.job, ask, weights_digest=digest(stage.tensors), participants=len(company))
        keys = {site: self._share_keys[site] for site in company if task.tolerated_dropouts}
        roster = self._exchange.witness.roster
        proposal = propose(task, company, roster=roster, share_keys=keys)
        self._store.keep_sum(BegunSum(terms=proposal.terms, commitments={}))
        total = SumCoordinator(proposal.terms, roster=roster)

        def accept(site: SiteId, reply: Opened[Reply]) -> bool:
            if not isinstance(reply.document.body, Committed):
                return False
            total.accept_commitment(site, reply.document.body.commitment.encode())
            return True

        bodies: dict[SiteId, Asked] = {site: CommitRequest(proposal=proposal) for site in company}
        # Nobody has paid yet: where others who rest could take its place, a silent site is not waited for.
        answers = self._asked(bodies, accept, terms=proposal.terms, company=self._exchange.active)
        stage.note(answers, in_vain=False)
        if answers.behind and task.tolerated_dropouts:
            # A restart loses the key under which others encrypt shares to a site.
            self._admit(answers.behind)
        if answers.good != set(company):
            return None
        begun = BegunSum(terms=proposal.terms, commitments=total.signed["commitments"])
        # From here on sites may charge: a coordinator that dies can ask for the same again, byte for byte.
        self._store.keep_sum(begun)
        return begun

    def _finished(self, begun: BegunSum, stage: _Stage) -> Gathered | None:
        """The total of the attempt ``begun``; nothing if it has to be given up."""
        if begun.terms.task.weights_digest != digest(stage.tensors):
            return None
        total = SumCoordinator(begun.terms, roster=self._exchange.witness.roster)
        received: dict[SiteId, Received] = {}
        phases: list[_Answers] = []
        try:
            for site, raw in begun.commitments.items():
                total.accept_commitment(site, raw.encode())
            phases.append(self._vectors(begun.terms, total, stage.tensors, received))
            if begun.terms.task.tolerated_dropouts:
                survivors = total.survivors()
                phases.append(self._voted(begun.terms, total, survivors))
                phases.append(self._revealed(begun.terms, total, total.votes()))
            result = total.total()
        except StoreUnavailable:
            # Our own fault, and no site is put out for it.
            raise
        # Whatever is wrong with this attempt, also one that lay on disk while the roster changed, the next is apart.
        except FedgradeError as error:
            for number, answers in enumerate(phases):
                # With recovery, more sites refuse to send than may be missing only if somebody dealt them shares that
                # do not open: they must not be the ones who are left out for it.
                stage.note(answers, in_vain=number > 0 or not begun.terms.task.tolerated_dropouts)
            stage.given_up.append(_reason(begun, error, phases))
            logger.warning("%s: given up: %s", stage.what, stage.given_up[-1])
            return None
        for answers in phases:
            stage.note(answers, in_vain=False)
        return Gathered(
            result=result,
            attempt=begun.terms.task.attempt,
            received={site: received[site] for site in total.included},
            evidence=SumEvidence(terms=begun.terms, **total.signed),
        )

    def _vectors(
        self, terms: SumTerms, total: SumCoordinator, tensors: bytes, received: dict[SiteId, Received]
    ) -> _Answers:
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

        spare = task.tolerated_dropouts
        return self._asked(dict.fromkeys(terms.participants, body), accept, terms=terms, spare=spare, tensors=tensors)

    def _voted(self, terms: SumTerms, total: SumCoordinator, survivors: SumSurvivors) -> _Answers:
        """Third phase, where dropouts are tolerated: all survivors sign who they are."""

        def accept(site: SiteId, reply: Opened[Reply]) -> bool:
            if not isinstance(reply.document.body, Voted):
                return False
            total.accept_vote(site, reply.document.body.vote.encode())
            return True

        return self._asked(dict.fromkeys(survivors.survivors, VoteRequest(survivors=survivors)), accept, terms=terms)

    def _revealed(self, terms: SumTerms, total: SumCoordinator, votes: SumVotes) -> _Answers:
        """Fourth phase: the shares that let the total of the survivors be read."""

        def accept(site: SiteId, reply: Opened[Reply]) -> bool:
            if not isinstance(reply.document.body, Revealed):
                return False
            total.accept_shares(site, reply.document.body.shares.encode())
            return True

        spare = len(votes.envelopes) - terms.threshold
        return self._asked(dict.fromkeys(votes.envelopes, RevealRequest(votes=votes)), accept, terms=terms, spare=spare)

    def _asked(
        self,
        bodies: Mapping[SiteId, Asked],
        accept: Callable[[SiteId, Opened[Reply]], bool],
        *,
        terms: SumTerms,
        spare: int = 0,
        tensors: bytes = b"",
        company: Collection[SiteId] | None = None,
    ) -> _Answers:
        """Ask, and ask the silent again, within this phase's part of the deadline.

        Without more than ``spare`` of those asked, the attempt is over, and nobody else is waited for. Who is silent is
        waited for where the attempt would be over without it, since the others would pay again; or, while nobody has
        paid, where ``company`` would be too few for any attempt.
        """
        phases = 4 if terms.task.tolerated_dropouts else 2
        patience = self._exchange.deadline_seconds / phases
        turns, asking = Turns(patience, each_seconds=patience / (1 + RESENDS)), True
        answers = _Answers()
        while asking:
            waiting = {
                site: body for site, body in bodies.items() if site in self._exchange.active and site not in answers
            }
            # Such as who was revoked meanwhile: nobody must pay for an attempt that is over.
            gone = [site for site in bodies if site not in waiting and site not in answers]
            answers.lost.update(dict.fromkeys(gone, "was put out"))
            if not waiting:
                break
            if len(answers.behind) + len(answers.lost) > spare:
                return answers
            replies = self._exchange.ask(waiting, tensors=tensors, deadline_seconds=turns.seconds, passing=_PASSING)
            for site, reply in replies.items():
                _sort(site, reply, accept, answers)
            here, enough = [site for site in bodies if site not in answers], len(bodies) - spare - len(answers.good)
            if company is not None:
                here, enough = list(company), self._exchange.job.spec.aggregation.minimum_sites
            asking = self._exchange.asks_again(turns, waiting, replies, company=here, at_least=enough)
        answers.lost.update({site: "did not answer" for site in bodies if site not in answers})
        return answers


def _sort(
    site: SiteId, reply: Opened[Reply], accept: Callable[[SiteId, Opened[Reply]], bool], answers: _Answers
) -> None:
    """Put ``reply`` where it belongs among ``answers``. Asked again, a site says the same: nobody gets a second try."""
    body = reply.document.body
    if isinstance(body, Refusal):
        kept = answers.behind if body.code in PASSING else answers.lost
        kept[site] = f"refused ({body.code}): {body.reason}"
        return
    try:
        if accept(site, reply):
            answers.good.add(site)
        else:
            answers.lost[site] = f"sent a {body.kind} that does not count"
    except StoreUnavailable:
        raise
    except FedgradeError as error:
        answers.lost[site] = f"sent a {body.kind} that does not count: {error}"
        logger.warning("site %s %s", site, answers.lost[site])


def _reason(begun: BegunSum, error: FedgradeError, phases: list[_Answers]) -> str:
    """Why the attempt ``begun`` came to nothing, in one line that names a few."""
    said = [f"{site} {why}" for answers in phases for site, why in sorted((answers.behind | answers.lost).items())]
    others = [f"and {len(said) - _NAMED} more"] if len(said) > _NAMED else []
    return "; ".join([f"attempt {begun.terms.task.attempt}: {error}", *said[:_NAMED], *others])
