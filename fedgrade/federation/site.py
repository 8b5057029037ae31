"""A partner's site: the one method through which anything leaves, and nothing leaves without a charge before it.

The site believes its own files alone: its key, its roster, its policy, its ledger. Everything in a request is checked
against them. It knows no network; a door hands it bytes and carries bytes away.
"""

import hashlib
import logging
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import assert_never

from fedgrade.data.manifest import Split
from fedgrade.errors import (
    AlreadyCharged,
    AttemptOver,
    BudgetExceeded,
    CacheUnavailable,
    DataRefused,
    FedgradeError,
    JobRefused,
    LedgerBroken,
    LedgerUnavailable,
    MessageRefused,
    ModelRefused,
    PolicyViolated,
    SignatureRefused,
    SiteWaits,
)
from fedgrade.federation.activity import AccountStanding, Activity, standings_of
from fedgrade.federation.charging import Ask, Charging, Reserved
from fedgrade.federation.holdings import SiteData, read_holdings, require_room
from fedgrade.federation.house_rules import HouseRules
from fedgrade.federation.messages import (
    AdmitRequest,
    Admitted,
    CommitRequest,
    Committed,
    ContributeRequest,
    Contribution,
    Opened,
    Refusal,
    RefusalCode,
    Reply,
    Request,
    Revealed,
    RevealRequest,
    Said,
    Voted,
    VoteRequest,
    read_message,
    write_message,
)
from fedgrade.federation.outbox import Outbox
from fedgrade.federation.payloads import Head, read_head, write_release
from fedgrade.federation.policy import Policy, admit, require_coordinator, require_release
from fedgrade.federation.releases import SiteRows, compute_release, load_rows, noisy_sum
from fedgrade.federation.site_accounts import OpenJob, SiteAccounts
from fedgrade.federation.sum_desk import SumDesk
from fedgrade.federation.witness import require_growth
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import open_sealed
from fedgrade.trust.identity import Roster, SigningKey, SiteId
from fedgrade.trust.records import Purpose
from fedgrade.trust.transparency import open_head

logger = logging.getLogger(__name__)


MAX_REASON = 1000  # characters


@dataclass(frozen=True, kw_only=True)
class SiteIdentity:
    """Who this site is, and whose word it takes."""

    site: SiteId
    key: SigningKey
    roster: Roster


class Site:
    """One partner's side of every job. Its only door to the outside is :meth:`answer`."""

    def __init__(
        self,
        *,
        identity: SiteIdentity,
        data: SiteData,
        rules: HouseRules,
        charging: Charging,
        outbox: Outbox,
        members: Path,
    ) -> None:
        self._identity = identity
        self._data = data
        self._rules = rules
        self._policy: Policy | None = None
        self._charging = charging
        self._outbox = outbox
        # A deterministic signature is a secret that only this key can make: commitments bind and reveal nothing.
        self._secret = hashlib.sha256(identity.key.sign(b"fedgrade manifest commitment 1")).digest()
        self._accounts = SiteAccounts(charging, members=members, secret=self._secret, lineage=data.lineage)
        self._sums = SumDesk(site=identity.site, key=identity.key, roster=identity.roster)
        self._jobs: dict[str, OpenJob] = {}
        self._one_at_a_time = threading.Lock()
        self._activity = Activity()

    @property
    def activity(self) -> Activity:
        """What this site is at; may be asked at any time, by any thread."""
        return self._activity

    @property
    def standings(self) -> tuple[AccountStanding, ...]:
        """What is spent of each account; may be asked at any time, by any thread."""
        return standings_of(self._charging)

    @property
    def undelivered(self) -> int:
        """How many answers that were charged for have not been seen to leave this machine."""
        return self._outbox.undelivered

    def delivered(self, raw: bytes) -> None:
        """The reply to the message ``raw`` has left this machine; whoever carries it says so, any thread."""
        self._outbox.delivered(digest(raw))

    def take_roster(self, roster: Roster) -> None:
        """Go by ``roster`` from the next request on.

        Raises:
            SignatureRefused: it names another coordinator, or this site with another key or not at all.
        """
        site, before = self._identity.site, self._identity.roster
        if roster.coordinator != before.coordinator:
            raise SignatureRefused(f"roster: names another coordinator than {before.coordinator.fingerprint}")
        if roster.key_of(site) != self._identity.key.public:
            raise SignatureRefused(f"roster: names {site} with another key than its own")
        with self._one_at_a_time:
            self._identity = replace(self._identity, roster=roster)
            self._sums.take_roster(roster)
            if not before.sites.items() <= roster.sites.items():
                # Somebody left, with whom this site may just have signed a set.
                self._sums.forget()

    def answer(self, raw: bytes) -> bytes:
        """The signed reply to the message ``raw``: what was asked for, or a refusal that says why. Never raises.

        Guarantee: no release leaves without a ledger entry that charged for it, and a request asked twice gets the
        same bytes twice.
        """
        request_digest = digest(raw)
        with self._one_at_a_time:
            try:
                request = read_message(raw, as_=Request, signed_by=self._identity.roster.coordinator)
                policy = self._current_policy()
                kept = self._outbox.find(request_digest)
                if kept is not None:
                    self._require_sendable(request.document, policy)
                return kept if kept is not None else self._fulfil(request, request_digest, policy)
            except Exception as error:  # noqa: BLE001 - a door: whatever happens, the coordinator learns only a code
                return self._refuse(error, request_digest)

    def _fulfil(self, request: Opened[Request], request_digest: str, policy: Policy) -> bytes:
        document = request.document
        if document.site != self._identity.site:
            raise MessageRefused(f"message for {document.site}; this is {self._identity.site}")
        match document.body:
            case AdmitRequest():
                return self._admit(document, document.body, request_digest, policy)
            case CommitRequest():
                return self._commit(document.job, document.body, request_digest, policy)
            case ContributeRequest():
                return self._contribute(request, document.body, request_digest, policy)
            case VoteRequest():
                self._require_still_in(document.job, policy)
                return self._reply(Voted(vote=self._sums.vote(document.body.survivors)), request_digest)
            case RevealRequest():
                self._require_still_in(document.job, policy)
                return self._reply(Revealed(shares=self._sums.reveal(document.body.votes)), request_digest)
            case _:
                assert_never(document.body)

    def _current_policy(self) -> Policy:
        """The partner's policy as it stands now; what was opened under another is forgotten, and asked for anew."""
        policy = self._rules.now()
        require_coordinator(policy, self._identity.roster.coordinator)
        if policy != self._policy:
            self._jobs = {}
            # A set that this site signed may be too small by now.
            self._sums.forget()
            self._policy = policy
        return policy

    def _admit(self, request: Request, body: AdmitRequest, request_digest: str, policy: Policy) -> bytes:
        opened = self._read_job(body.job_envelope, policy)
        # Here alone: who is struck off the roster in the middle of a job is not asked any more, and the job goes on.
        self._require_known(opened.job)
        self._note(job=opened.job.spec.name, stage="shown")
        if opened.job.digest != request.job:
            raise MessageRefused("the sealed job is not the one that the message names")
        seen = self._require_watched(body)
        members = self._accounts.require_apart(opened.holdings)
        accounts = self._accounts.affordable(opened, policy)
        self._rules.require_approved(policy, opened.job, body.job_envelope)
        self._prepare(opened)
        self._accounts.put_under_account(opened.holdings, members)
        self._charging.accept(opened.job, envelope=body.job_envelope, accounts=accounts)
        self._charging.witness(body.ledger)
        self._jobs = {opened.job.digest: opened}
        logger.info("job %s admitted, epsilon %s planned", opened.job.spec.name, opened.job.spec.privacy.target_epsilon)
        admitted = Admitted(
            head=self._charging.sealed_head,
            consistency=self._charging.growth_since(seen),
            share_key=self._sums.share_key(opened.job),
            evaluates="evaluate" in policy.releases,
        )
        return self._reply(admitted, request_digest)

    def _prepare(self, opened: OpenJob) -> None:
        try:
            self._data.photos.prepare(opened.job.spec.model, opened.holdings.photos)
        except JobRefused as error:
            # It is about this machine's devices, which are nobody else's business.
            raise DataRefused(str(error)) from error

    def _require_watched(self, body: AdmitRequest) -> int:
        """Return if neither ledger was rolled back since the other side saw it; how many entries of this one it saw."""
        require_growth(body.ledger, standing=self._charging.checkpoint, coordinator=self._identity.roster.coordinator)
        if not body.seen:
            return 0
        seen = open_head(body.seen.encode(), owner=self._identity.site, signed_by=self._identity.key.public)
        self._charging.require_begins_with(seen)
        return seen.entries

    def _commit(self, job: str, body: CommitRequest, request_digest: str, policy: Policy) -> bytes:
        """Take part in a secure sum, if this site could answer and pay when its turn comes."""
        task = body.proposal.terms.task
        opened, ask = self._asked(job, task.purpose, task.round_index, task.attempt, policy=policy)
        self._accounts.payers(opened, ask, policy)
        commitment = self._sums.commit(opened.job, ask, body.proposal, policy=policy)
        return self._reply(Committed(commitment=commitment), request_digest)

    def _asked(
        self, job: str, purpose: Purpose, round_index: int, attempt: int, *, policy: Policy
    ) -> tuple[OpenJob, Ask]:
        """The job, and the place in it that is asked for, which its plan has and which nothing was charged for yet."""
        opened = self._opened(job, policy)
        rounds = opened.job.plan.rounds if purpose == "train" else 1
        self._note(job=opened.job.spec.name, stage=f"{purpose}, round {round_index + 1} of {rounds}")
        require_release(policy, purpose)
        self._require_approved(opened.job, policy)
        if not 0 <= round_index < rounds or attempt < 0:
            raise MessageRefused(f"{purpose} round {round_index}: the plan has no such round")
        ask = Ask(job=opened.job.digest, purpose=purpose, round_index=round_index, attempt=attempt)
        self._charging.require_fresh(ask, maximum_attempts=policy.maximum_attempts)
        return opened, ask

    def _require_approved(self, job: TrainingJob, policy: Policy) -> None:
        """A person may take an approval back, or ask for one from now on, in the middle of a job too."""
        self._rules.require_approved(policy, job, self._charging.accepted(job.digest).job_envelope)

    def _require_sendable(self, document: Request, policy: Policy) -> None:
        """Return if an answer that was kept, and may never have arrived, may leave by the partner's word as it is now.

        It was paid for under the rules of then, so that what a job must be like to be charged for does not matter here.
        """
        if isinstance(document.body, ContributeRequest):
            require_release(policy, document.body.purpose)
        if known := self._jobs.get(document.job):
            self._require_approved(known.job, policy)
        else:
            envelope = self._charging.accepted(document.job).job_envelope
            coordinator = self._identity.roster.coordinator
            self._require_approved(open_sealed(envelope.encode(), as_=TrainingJob, signed_by=coordinator), policy)

    def _require_still_in(self, named: str, policy: Policy) -> None:
        """Return unless a person took this site out of the job whose sum it is in; ``named`` is by the coordinator."""
        if (job := self._sums.job) is None:
            # Nothing to help with, as the answer will say: masks are not kept across a restart.
            return
        if named != job.digest:
            raise AttemptOver("this site is in a sum of another job than the message names; begin a further attempt")
        self._require_approved(job, policy)

    def _contribute(
        self, request: Opened[Request], body: ContributeRequest, request_digest: str, policy: Policy
    ) -> bytes:
        opened, ask = self._asked(request.document.job, body.purpose, body.round_index, body.attempt, policy=policy)
        head = read_head(request.tensors, opened.job)
        accounts = self._accounts.payers(opened, ask, policy)
        weights = request.document.tensors_digest
        transcript = self._sums.confirm(opened.job, ask, body.commitments, weights_digest=weights)
        # Charge before any photo is read: a crash may waste budget but can never hide a release.
        reserved = self._charging.reserve(
            ask,
            accounts=accounts,
            mechanism=opened.job.plan.mechanism(ask.purpose),
            ceiling=policy.ceiling,
            weights_digest=weights,
            transcript=transcript or "",
        )
        try:
            masked, tensors = self._released(opened, ask, head, reserved, under_masks=transcript is not None)
        except Exception as error:
            self._sums.forget()
            self._charging.abort(reserved=reserved, reason=type(error).__name__)
            if isinstance(error, FedgradeError):
                # Whatever stopped a release may follow from a single item: the reason stays in this site's log.
                raise DataRefused(f"{ask.purpose} round {ask.round_index}: {error}") from error
            raise
        receipt = self._charging.commit(ask, reserved=reserved, message_digest=digest(tensors))
        contribution = Contribution(
            purpose=ask.purpose,
            round_index=ask.round_index,
            attempt=ask.attempt,
            receipt=receipt.line.decode(),
            head=self._charging.sealed_head,
            masked=masked,
        )
        reply = self._reply(contribution, request_digest, tensors=tensors)
        self._outbox.keep(request_digest, reply)
        logger.info("%s round %d answered", ask.purpose, ask.round_index)
        return reply

    def _released(
        self, opened: OpenJob, ask: Ask, head: Head, reserved: Reserved, *, under_masks: bool
    ) -> tuple[str, bytes]:
        """The arrays of the release that was ``reserved``, and what vouches for them if they are under masks."""
        cohorts = frozenset(account.cohort for account in reserved.accounts)
        rows = partial(self._rows, opened, cohorts)
        if not under_masks:
            return "", compute_release(opened.job, ask.purpose, head, site=self._identity.site, rows=rows)
        upload = self._sums.mask(noisy_sum(opened.job, ask.purpose, head, rows=rows))
        return upload.document.decode(), write_release(upload.vector)

    def _read_job(self, envelope: str, policy: Policy) -> OpenJob:
        """The sealed job, checked against this site's policy and read together with this site's manifest."""
        coordinator = self._identity.roster.coordinator
        job = open_sealed(envelope.encode(), as_=TrainingJob, signed_by=coordinator)
        admit(job, policy=policy, site=self._identity.site, declared_items=self._data.declared_items)
        require_room(job, self._data)
        holdings = read_holdings(self._data, grading=job.spec.grading, policy=policy, secret=self._secret)
        return OpenJob(job=job, holdings=holdings)

    def _require_known(self, job: TrainingJob) -> None:
        """Refuse a job with participants whom this site's own roster does not name: they would hide nobody."""
        strangers = [site for site in job.participants if site not in self._identity.roster.sites]
        if strangers:
            raise PolicyViolated(f"job {job.spec.name}: participant {strangers[0]} is not on this site's roster")

    def _opened(self, job_digest: str, policy: Policy) -> OpenJob:
        if job_digest not in self._jobs:
            # After a restart: the ledger remembers what was admitted, and policy is asked once more.
            opened = self._read_job(self._charging.accepted(job_digest).job_envelope, policy)
            # The partner may have moved its ceiling meanwhile; charges must stand under the one on record.
            self._accounts.put_under_account(opened.holdings, self._accounts.require_apart(opened.holdings))
            self._jobs = {job_digest: opened}
        return self._jobs[job_digest]

    def _rows(self, opened: OpenJob, cohorts: frozenset[str], split: Split) -> SiteRows:
        if (split, cohorts) not in opened.rows:
            items = opened.holdings.items(split, cohorts=cohorts)
            opened.rows[split, cohorts] = load_rows(self._data.photos, opened.job.spec.model, items, split)
        return opened.rows[split, cohorts]

    def _note(self, **changes: str) -> None:
        self._activity = replace(self._activity, **changes)

    def _reply(self, body: Said, request_digest: str, *, tensors: bytes = b"") -> bytes:
        reply = Reply(
            site=self._identity.site, request_digest=request_digest, body=body, tensors_digest=digest(tensors)
        )
        return write_message(reply, tensors=tensors, key=self._identity.key)

    def _refuse(self, error: Exception, request_digest: str) -> bytes:
        """A refusal. Errors about this site's own data keep their details at home."""
        codes: list[RefusalCode] = [code for kind, code in _CODES if isinstance(error, kind)]
        code = codes[0] if codes else "malformed"
        self._note(refusal=f"{code}: {error if isinstance(error, FedgradeError) else type(error).__name__}")
        if isinstance(error, FedgradeError):
            logger.warning("refused (%s): %s", code, error)
        else:
            logger.error("refused (%s)", code, exc_info=error)
        # Paths and file names of this machine are nobody else's business either.
        private = code in {"data", "ledger"} or not isinstance(error, FedgradeError)
        reason = "this site's own operator can see why in its log" if private else str(error)
        return self._reply(Refusal(code=code, reason=reason[:MAX_REASON]), request_digest)


_CODES: tuple[tuple[type[Exception], RefusalCode], ...] = (
    (PolicyViolated, "policy"),
    (SiteWaits, "waiting"),
    (BudgetExceeded, "budget"),
    (AlreadyCharged, "spent"),
    (AttemptOver, "attempt"),
    (MessageRefused, "stale"),
    (DataRefused, "data"),
    (LedgerUnavailable, "ledger"),
    # As a ledger on a full disk: nobody's decision about the job, and there may be room again later.
    (CacheUnavailable, "ledger"),
    (LedgerBroken, "ledger"),
    (ModelRefused, "model"),
)
