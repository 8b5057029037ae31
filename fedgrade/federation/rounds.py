"""One loop drives every cohort: in process, Flower's simulation engine, a Flower deployment.

:func:`run_job` asks for one stage after another (a feature centre, training rounds, one evaluation), steps, and saves
after each. It is the coordinator's side; it sees releases and receipts, never a photo, and takes no one's word for
either.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from fedgrade.aggregation.mean import (
    ServerState,
    add_update,
    descend,
    final_weights,
    mean_of_total,
)
from fedgrade.errors import DocumentRefused, LedgerBroken, ModelRefused, SignatureRefused
from fedgrade.evaluation import ConfusionCounts, metrics
from fedgrade.federation.conversation import Conversation
from fedgrade.federation.exchange import (
    Cohort,
    Exchange,
    Hear,
    Revoked,
    Watch,
    nobody_revoked,
    unheard,
    unwatched,
)
from fedgrade.federation.gathered import Gathered
from fedgrade.federation.payloads import Head, write_head
from fedgrade.federation.progress import Progress
from fedgrade.federation.release import ModelRelease, publish, standing_release
from fedgrade.federation.store import RunState, RunStore
from fedgrade.federation.witness import Witness
from fedgrade.job import TrainingJob
from fedgrade.privacy.grid import from_grid
from fedgrade.trust.canonical import digest
from fedgrade.trust.enrolment import utc_text
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.ledger import Entry, LedgerWriter
from fedgrade.trust.records import COORDINATOR, DiscreteGaussian, LedgerState, Purpose, Released, RoundClosed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a job: what is asked for, and which round of it this is."""

    purpose: Purpose
    round_index: int


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """The coordinator's identity, what it saw of others' ledgers, its clock and its ways to report.

    ``report`` is given each finished stage, ``hear`` what a site refuses with, ``watch`` who is waited for in pauses
    between questions; ``revoked`` says who was struck off by now. ``deadline_seconds`` bounds the wait for one stage,
    ``admission_seconds`` that for sites which wait for a person, or for their own hours, before they take part.
    """

    key: SigningKey
    witness: Witness
    clock: Callable[[], datetime]
    report: Callable[[Progress], None]
    deadline_seconds: float
    admission_seconds: float = 0.0
    hear: Hear = unheard
    watch: Watch = unwatched
    revoked: Revoked = nobody_revoked


def stages_of(job: TrainingJob) -> tuple[Stage, ...]:
    """Every stage of ``job`` in order."""
    rounds = (Stage(purpose="train", round_index=index) for index in range(job.plan.rounds))
    return (
        Stage(purpose="centre", round_index=0),
        *rounds,
        Stage(purpose="evaluate", round_index=0),
    )


def run_job(job: TrainingJob, cohort: Cohort, *, coordinator: Coordinator, store: RunStore, log: "RoundLog") -> str:
    """Train ``job`` with ``cohort`` from wherever ``store`` says it stands; returns the digest of the signed release.

    Of a job that the coordinator's ledger says was released, the release is there: nobody is asked, nothing is signed.

    Raises:
        RoundFailed: fewer sites than ``aggregation.minimum_sites`` answered; the checkpoint before it stands.
        LedgerBroken: the coordinator's ledger is older than the checkpoint, or they do not belong together.
        SignatureRefused: the checkpoint is not signed by this coordinator.
        StoreUnavailable: what must be kept could not be; the checkpoint before it stands.
    """
    if standing := _released_before(job, coordinator=coordinator, store=store, log=log):
        return standing
    exchange = _exchange(job, cohort, coordinator)
    state, stages = store.load(job) or _start(job), stages_of(job)
    if state.closing is not None:
        # A crash between checkpoint and ledger; nobody needs to be asked again.
        log.close_round(state.closing, now=coordinator.clock())
    log.require_closed(job, stages[: state.next_stage], head=_current_head(job, state))
    conversation = Conversation(exchange, key=coordinator.key, ledger=log.sealed_head, store=store)
    stood = log.stood(job, stages[: state.next_stage])
    conversation.admit(stood=stood, patience_seconds=coordinator.admission_seconds)
    for index in range(state.next_stage, len(stages)):
        stage, head = stages[index], _head(job, state, stages[index])
        gathered = conversation.gather(stage.purpose, stage.round_index, write_head(head))
        after = _advance(job, state, stage, gathered)
        closing = _closing(job, stage, gathered, before=head, after=_current_head(job, after))
        state = replace(after, closing=closing)
        with store.at_once():
            store.keep_receipts(index, gathered.receipts)
            if stage.purpose == "evaluate":
                store.keep_evaluation(gathered.tensors, gathered.evidence)
            store.save(state, job)
        now = coordinator.clock()
        log.close_round(closing, now=now)
        coordinator.report(
            Progress(
                stage=index + 1,
                stages=len(stages),
                purpose=stage.purpose,
                answered=len(gathered.sites),
                participants=len(job.participants),
                finished=utc_text(now),
                absent=exchange.absences(gathered.sites),
            )
        )
    return _publish(job, state, coordinator=coordinator, store=store, log=log)


def _exchange(job: TrainingJob, cohort: Cohort, coordinator: Coordinator) -> Exchange:
    return Exchange(
        job,
        cohort,
        coordinator.key,
        coordinator.witness,
        coordinator.deadline_seconds,
        hear=coordinator.hear,
        watch=coordinator.watch,
        revoked=coordinator.revoked,
    )


class RoundLog:
    """The coordinator's own ledger: which receipts it holds for which round, and what it published."""

    def __init__(self) -> None:
        self._writer: LedgerWriter
        self._closed: dict[tuple[str, Purpose, int], RoundClosed] = {}
        self._released: set[tuple[str, str]] = set()

    @classmethod
    def open(cls, writer_of: Callable[[Callable[[Entry], None]], LedgerWriter], *, now: datetime) -> "RoundLog":
        """The log whose ledger ``writer_of`` opens, replaying it into the observer that it is given."""
        log = cls()
        log._writer = writer_of(log._observe)
        log._writer.start(owner=COORDINATOR, role="coordinator", now=now)
        return log

    @property
    def sealed_head(self) -> str:
        """Where this ledger stands, signed by the coordinator."""
        return self._writer.sealed_head(owner=COORDINATOR).decode()

    def stood(self, job: TrainingJob, stages: Iterable[Stage]) -> dict[SiteId, LedgerState]:
        """Where the ledger of each site stood after the last of ``stages`` that it answered."""
        stood: dict[SiteId, LedgerState] = {}
        for stage in stages:
            if closed := self._closed.get((job.digest, stage.purpose, stage.round_index)):
                stood.update(closed.ledgers)
        return stood

    def require_closed(self, job: TrainingJob, stages: Iterable[Stage], *, head: Head) -> None:
        """Return if each of ``stages`` of ``job``, done by now, stands in the ledger, the last with ``head`` after.

        Raises:
            LedgerBroken: it does not; nobody should pay for stages that no verifier would accept.
        """
        closed = None
        for stage in stages:
            closed = self._closed.get((job.digest, stage.purpose, stage.round_index))
            if closed is None:
                raise LedgerBroken(
                    f"{stage.purpose} round {stage.round_index}: is done by the checkpoint, and the coordinator's "
                    "ledger does not have it: it was rolled back; restore its newest copy"
                )
        if closed is not None and (found := digest(write_head(head))) != closed.weights_after:
            raise LedgerBroken(
                f"{closed.purpose} round {closed.round_index}: ended with weights {closed.weights_after[:16]} by the "
                f"coordinator's ledger, and the checkpoint has {found[:16]}: they do not belong together; restore the "
                "newest copy of both"
            )

    def close_round(self, closed: RoundClosed, *, now: datetime) -> None:
        """Record one stage, once.

        Raises:
            LedgerBroken: the stage stands in the ledger with other weights or receipts.
        """
        place = closed.job, closed.purpose, closed.round_index
        standing = self._closed.get(place)
        if standing is None:
            self._writer.append(closed, now=now)
            self._closed[place] = closed
        elif standing != closed:
            raise LedgerBroken(
                f"{closed.purpose} round {closed.round_index}: was closed with other replies before a crash; the "
                "coordinator's ledger and its checkpoint do not belong together"
            )

    def releases_of(self, job: TrainingJob) -> frozenset[str]:
        """The digests of what was published of ``job``."""
        return frozenset(release for published, release in self._released if published == job.digest)

    def release(self, job: TrainingJob, release_digest: str, *, now: datetime) -> None:
        """Record that a model was published, once."""
        if (job.digest, release_digest) not in self._released:
            self._writer.append(Released(job=job.digest, release_digest=release_digest), now=now)
            self._released.add((job.digest, release_digest))

    def close(self) -> None:
        """Give the ledger up."""
        self._writer.close()

    def _observe(self, entry: Entry) -> None:
        match entry.body:
            case RoundClosed():
                body = entry.body
                self._closed[body.job, body.purpose, body.round_index] = body
            case Released():
                self._released.add((entry.body.job, entry.body.release_digest))
            case _:
                pass


def _start(job: TrainingJob) -> RunState:
    return RunState(
        next_stage=0,
        centre=np.zeros(job.spec.model.feature_dimensions),
        server=ServerState.start(np.zeros(job.parameters)),
        counts=ConfusionCounts.zero(job.spec.grading.grades),
        contributions={},
    )


def _advance(job: TrainingJob, state: RunState, stage: Stage, gathered: Gathered) -> RunState:
    """The state after one stage's result: pure arithmetic on public numbers."""
    answered = {site: state.contributions.get(site, 0) + 1 for site in gathered.sites}
    state = replace(state, next_stage=state.next_stage + 1, contributions={**state.contributions, **answered})
    match stage.purpose:
        case "centre":
            centre = mean_of_total(
                gathered.result, max_norm=1.0, mechanism=job.plan.centre, declared_items=_declared(job, gathered)
            )
            return replace(state, centre=centre)
        case "train":
            return replace(state, server=_train(job, state.server, stage.round_index, gathered))
        case "evaluate":
            total = from_grid(gathered.result, max_norm=1.0, mechanism=job.plan.evaluate)
            grades = job.spec.grading.grades
            return replace(state, counts=ConfusionCounts.of(total.reshape(grades, grades)))


def _train(job: TrainingJob, server: ServerState, round_index: int, gathered: Gathered) -> ServerState:
    spec, rounds, mechanism = job.spec.aggregation, job.plan.rounds, job.plan.train
    if isinstance(mechanism, DiscreteGaussian):
        gradient = mean_of_total(
            gathered.result,
            max_norm=job.plan.max_grad_norm,
            mechanism=mechanism,
            declared_items=_declared(job, gathered),
        )
        return descend(server, gradient, spec=spec, round_index=round_index, rounds=rounds)
    return add_update(server, gathered.result, spec=spec, round_index=round_index, rounds=rounds)


def _declared(job: TrainingJob, gathered: Gathered) -> int:
    """What the sites in a result declared of their size, together."""
    return sum(job.declared_items[site] for site in gathered.sites)


def _closing(job: TrainingJob, stage: Stage, gathered: Gathered, *, before: Head, after: Head) -> RoundClosed:
    """What the coordinator's ledger says of one stage."""
    return RoundClosed(
        job=job.digest,
        round_index=stage.round_index,
        attempt=gathered.attempt,
        purpose=stage.purpose,
        receipts={site: digest(line) for site, line in sorted(gathered.receipts.items())},
        ledgers=dict(sorted(gathered.ledgers.items())),
        weights_before=digest(write_head(before)),
        weights_after=digest(write_head(after)),
    )


def _head(job: TrainingJob, state: RunState, stage: Stage) -> Head:
    """What sites are shown in this stage: the current iterate, or for evaluation the model to be released."""
    return _final_head(job, state) if stage.purpose == "evaluate" else _current_head(job, state)


def _current_head(job: TrainingJob, state: RunState) -> Head:
    return Head.of(job, state.server.weights, state.centre)


def _final_head(job: TrainingJob, state: RunState) -> Head:
    return Head.of(job, final_weights(state.server), state.centre)


def _released_before(job: TrainingJob, *, coordinator: Coordinator, store: RunStore, log: RoundLog) -> str | None:
    """The digest of the release of ``job`` that the ledger knows of; None where it knows of none.

    Raises:
        LedgerBroken: the ledger knows of one that is not there.
    """
    known = log.releases_of(job)
    if not known:
        return None
    standing = standing_release(store.release, signed_by=coordinator.key.public)
    if standing is None or standing.digest not in known:
        raise LedgerBroken(
            f"job {job.spec.name}: was released by the coordinator's ledger, and {store.release.where('')} does not "
            "have that release; restore it, for a job is released once"
        )
    logger.warning("job %s: was released before (%s); nobody is asked again", job.spec.name, standing.digest[:16])
    return standing.digest


def _publish(job: TrainingJob, state: RunState, *, coordinator: Coordinator, store: RunStore, log: RoundLog) -> str:
    head, now = _final_head(job, state), coordinator.clock()
    release = ModelRelease(
        job=job,
        weights_digest=digest(write_head(head)),
        counts=state.counts,
        metrics=metrics(state.counts, job.spec.grading),
        contributions=state.contributions,
        published=now.isoformat(timespec="seconds"),
    )
    published = _written_before(release, coordinator=coordinator, store=store)
    if published is None:
        published = publish(release, head, to=store.release, key=coordinator.key)
    log.release(job, published, now=now)
    logger.info("job %s: released", job.spec.name)
    return published


def _written_before(release: ModelRelease, *, coordinator: Coordinator, store: RunStore) -> str | None:
    """The digest of ``release`` as a process signed it that was killed before its entry; partners may have it."""
    try:
        standing = standing_release(store.release, signed_by=coordinator.key.public)
    except (DocumentRefused, SignatureRefused, ModelRefused):
        # No release that anybody would take: this one takes its place.
        return None
    if standing is None or replace(standing.release, published=release.published) != release:
        return None
    return standing.digest
