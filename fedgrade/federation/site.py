"""A partner's site: the one method through which anything leaves, and nothing leaves without a charge before it.

The site believes its own files alone: its key, its roster, its policy, its ledger. Everything in a request is checked
against them. It knows no network; a door hands it bytes and carries bytes away.
"""

import hashlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

from fedgrade.data.manifest import Split
from fedgrade.errors import (
    AlreadyCharged,
    BudgetExceeded,
    DataRefused,
    FedgradeError,
    LedgerBroken,
    LedgerUnavailable,
    MessageRefused,
    ModelRefused,
    PolicyViolated,
)
from fedgrade.federation.charging import Ask, Charging, require_company
from fedgrade.federation.holdings import Holdings, SiteData, read_holdings
from fedgrade.federation.members import Members
from fedgrade.federation.messages import (
    AdmitRequest,
    Admitted,
    ContributeRequest,
    Contribution,
    Opened,
    Refusal,
    RefusalCode,
    Reply,
    Request,
    read_message,
    write_message,
)
from fedgrade.federation.outbox import Outbox
from fedgrade.federation.payloads import read_head
from fedgrade.federation.policy import Policy, Summation, admit, require_hidden_uploads
from fedgrade.federation.releases import SiteRows, compute_release, load_rows
from fedgrade.federation.witness import require_growth
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import open_sealed
from fedgrade.trust.identity import Roster, SigningKey, SiteId
from fedgrade.trust.records import AccountKey, Partition
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
        policy: Policy,
        charging: Charging,
        outbox: Outbox,
        members: Path,
        summation: Summation = Summation.PLAIN,
    ) -> None:
        self._identity = identity
        self._data = data
        self._policy = policy
        self._charging = charging
        self._outbox = outbox
        self._summation = summation
        # A deterministic signature is a secret that only this key can make: commitments bind and reveal nothing.
        self._secret = hashlib.sha256(identity.key.sign(b"fedgrade manifest commitment 1")).digest()
        self._members = Members(members, secret=self._secret)
        self._jobs: dict[str, _OpenJob] = {}
        self._one_at_a_time = threading.Lock()

    def answer(self, raw: bytes) -> bytes:
        """The signed reply to the message ``raw``: what was asked for, or a refusal that says why. Never raises.

        Guarantee: no release leaves without a ledger entry that charged for it, and a request asked twice gets the
        same bytes twice.
        """
        request_digest = digest(raw)
        with self._one_at_a_time:
            try:
                request = read_message(raw, as_=Request, signed_by=self._identity.roster.coordinator)
                kept = self._outbox.find(request_digest)
                return kept if kept is not None else self._fulfil(request, request_digest)
            except Exception as error:  # noqa: BLE001 - a door: whatever happens, the coordinator learns only a code
                return self._refuse(error, request_digest)

    def _fulfil(self, request: Opened[Request], request_digest: str) -> bytes:
        document = request.document
        if document.site != self._identity.site:
            raise MessageRefused(f"message for {document.site}; this is {self._identity.site}")
        match document.body:
            case AdmitRequest():
                return self._admit(document, document.body, request_digest)
            case ContributeRequest():
                return self._contribute(request, document.body, request_digest)
            case _:
                assert_never(document.body)

    def _admit(self, request: Request, body: AdmitRequest, request_digest: str) -> bytes:
        opened = self._read_job(body.job_envelope)
        if opened.job.digest != request.job:
            raise MessageRefused("the sealed job is not the one that the message names")
        seen = self._require_watched(body)
        members = self._require_apart(opened.holdings)
        accounts = self._affordable(opened)
        self._data.photos.prepare(opened.job.spec.model, opened.holdings.photos)
        self._put_under_account(opened.holdings, members)
        self._charging.accept(opened.job, envelope=body.job_envelope, accounts=accounts)
        self._charging.witness(body.ledger)
        self._jobs = {opened.job.digest: opened}
        logger.info("job %s admitted, epsilon %s planned", opened.job.spec.name, opened.job.spec.privacy.target_epsilon)
        admitted = Admitted(head=self._charging.sealed_head, consistency=self._charging.growth_since(seen))
        return self._reply(admitted, request_digest)

    def _require_watched(self, body: AdmitRequest) -> int:
        """Return if neither ledger was rolled back since the other side saw it; how many entries of this one it saw."""
        require_growth(body.ledger, standing=self._charging.checkpoint, coordinator=self._identity.roster.coordinator)
        if not body.seen:
            return 0
        seen = open_head(body.seen.encode(), owner=self._identity.site, signed_by=self._identity.key.public)
        self._charging.require_begins_with(seen)
        return seen.entries

    def _contribute(self, request: Opened[Request], body: ContributeRequest, request_digest: str) -> bytes:
        opened = self._opened(request.document.job)
        plan = opened.job.plan
        ask = Ask(job=opened.job.digest, purpose=body.purpose, round_index=body.round_index, attempt=body.attempt)
        if not 0 <= body.round_index < (plan.rounds if body.purpose == "train" else 1) or body.attempt < 0:
            raise MessageRefused(f"{body.purpose} round {body.round_index}: the plan has no such round")
        self._charging.require_fresh(ask, maximum_attempts=self._policy.maximum_attempts)
        head = read_head(request.tensors, opened.job)
        accounts = self._payers(opened, ask)
        # Charge before any photo is read: a crash may waste budget but can never hide a release.
        reserved = self._charging.reserve(
            ask,
            accounts=accounts,
            mechanism=plan.mechanism(body.purpose),
            ceiling=self._policy.ceiling,
            weights_digest=request.document.tensors_digest,
        )
        cohorts = frozenset(account.cohort for account in reserved.accounts)
        try:
            tensors = compute_release(
                opened.job,
                body.purpose,
                head,
                site=self._identity.site,
                rows=lambda split: self._rows(opened, split, cohorts),
            )
        except Exception as error:
            self._charging.abort(reserved=reserved, reason=type(error).__name__)
            if isinstance(error, FedgradeError):
                # Whatever stopped a release may follow from a single item: the reason stays in this site's log.
                raise DataRefused(f"{body.purpose} round {body.round_index}: {error}") from error
            raise
        receipt = self._charging.commit(ask, reserved=reserved, message_digest=digest(tensors))
        contribution = Contribution(
            purpose=body.purpose,
            round_index=body.round_index,
            attempt=body.attempt,
            receipt=receipt.line.decode(),
            head=self._charging.sealed_head,
        )
        reply = self._reply(contribution, request_digest, tensors=tensors)
        self._outbox.keep(request_digest, reply)
        logger.info("%s round %d answered", body.purpose, body.round_index)
        return reply

    def _read_job(self, envelope: str) -> "_OpenJob":
        """The sealed job, checked against this site's policy and read together with this site's manifest."""
        coordinator = self._identity.roster.coordinator
        job = open_sealed(envelope.encode(), as_=TrainingJob, signed_by=coordinator)
        admit(job, policy=self._policy, site=self._identity.site, declared_items=self._data.declared_items)
        require_hidden_uploads(job, self._summation)
        self._require_known(job)
        holdings = read_holdings(self._data, grading=job.spec.grading, policy=self._policy, secret=self._secret)
        return _OpenJob(job=job, holdings=holdings)

    def _require_known(self, job: TrainingJob) -> None:
        """Refuse a job with participants whom this site's own roster does not name: they would hide nobody."""
        strangers = [site for site in job.participants if site not in self._identity.roster.sites]
        if strangers:
            raise PolicyViolated(f"job {job.spec.name}: participant {strangers[0]} is not on this site's roster")

    def _opened(self, job_digest: str) -> "_OpenJob":
        if job_digest not in self._jobs:
            # After a restart: the ledger remembers what was admitted, and policy is asked once more.
            opened = self._read_job(self._charging.accepted(job_digest).job_envelope)
            # The partner may have moved its ceiling meanwhile; charges must stand under the one on record.
            self._put_under_account(opened.holdings, self._require_apart(opened.holdings))
            self._jobs = {job_digest: opened}
        return self._jobs[job_digest]

    def _require_apart(self, holdings: Holdings) -> Mapping[str, frozenset[str]]:
        """Who is in which cohort, if all of ``holdings`` may stand beside what is under account; writes nothing.

        Raises:
            LedgerBroken: terms differ from those on record, or an item would get a second budget.
        """
        for holding in holdings.cohorts.values():
            self._charging.require_standing(holding.dataset)
        manifests = {cohort: holding.manifest for cohort, holding in holdings.cohorts.items()}
        return self._members.require_apart(manifests, lineage=self._data.lineage, opened=self._charging.opened)

    def _put_under_account(self, holdings: Holdings, members: Mapping[str, frozenset[str]]) -> None:
        # Members first: after a crash in between, a cohort that the ledger does not know is simply listed anew.
        self._members.keep(members)
        for holding in holdings.cohorts.values():
            self._charging.open_dataset(holding.dataset)

    def _affordable(self, opened: "_OpenJob") -> tuple[AccountKey, ...]:
        """The accounts whose lifetime budget bears the whole job; the others stay out of it.

        Raises:
            BudgetExceeded: on one side none does; nothing is spent on a job that could not be finished.
            PolicyViolated: too few items are left to hide among.
        """
        plan, job, ceiling = opened.job.plan, opened.job.digest, self._policy.ceiling
        if self._charging.has_begun(job):
            # Shown again by a coordinator that resumes: part of the plan is in the spending already, and what is left
            # meets the ceiling at each reservation.
            return self._charging.accepted(job).accounts
        train = self._charging.solvent(
            self._accounts(opened, "train"),
            ceiling=ceiling,
            charge=lambda spending: plan.charge_training(spending, job=job),
        )
        test = self._charging.solvent(
            self._accounts(opened, "test"),
            ceiling=ceiling,
            charge=lambda spending: plan.charge_evaluation(spending, job=job),
        )
        for side in (train, test):
            self._require_company(opened, side)
        return train + test

    def _accounts(self, opened: "_OpenJob", partition: Partition) -> tuple[AccountKey, ...]:
        """The accounts of every cohort on one side."""
        return tuple(
            self._charging.account(holding.dataset, partition=partition)
            for _, holding in sorted(opened.holdings.cohorts.items())
        )

    def _payers(self, opened: "_OpenJob", ask: Ask) -> tuple[AccountKey, ...]:
        """The accounts admitted to the job that can pay for ``ask``, as the ledger has it.

        Raises:
            LedgerBroken: one of those admitted is of a cohort that is listed no more.
            BudgetExceeded: none can.
            PolicyViolated: too few items are left to hide among.
        """
        partition: Partition = "test" if ask.purpose == "evaluate" else "train"
        admitted = self._charging.accepted(ask.job).accounts
        accounts = tuple(account for account in admitted if account.partition == partition)
        for account in accounts:
            # Nobody's items may be read at the expense of others.
            if account not in self._accounts(opened, partition):
                raise LedgerBroken(
                    f"data {account.lineage}/{account.cohort}: was admitted to job {opened.job.spec.name} and is "
                    "listed no more; list it again, or let the job end without this site"
                )
        mechanism, ceiling = opened.job.plan.mechanism(ask.purpose), self._policy.ceiling
        paying = self._charging.payers(ask, accounts=accounts, mechanism=mechanism, ceiling=ceiling)
        # Attempts beyond the plan use budget up, so that a few items may be left alone in mid-job.
        self._require_company(opened, paying)
        return paying

    def _require_company(self, opened: "_OpenJob", paying: tuple[AccountKey, ...]) -> None:
        """Refuse what only cohorts with too few items together can pay for."""
        items = opened.holdings.declared_items(frozenset(account.cohort for account in paying))
        require_company(opened.job, items=items, policy_minimum=self._policy.minimum_items)

    def _rows(self, opened: "_OpenJob", split: Split, cohorts: frozenset[str]) -> SiteRows:
        if (split, cohorts) not in opened.rows:
            items = opened.holdings.items(split, cohorts=cohorts)
            opened.rows[split, cohorts] = load_rows(self._data.photos, opened.job.spec.model, items, split)
        return opened.rows[split, cohorts]

    def _reply(self, body: Admitted | Contribution | Refusal, request_digest: str, *, tensors: bytes = b"") -> bytes:
        reply = Reply(
            site=self._identity.site, request_digest=request_digest, body=body, tensors_digest=digest(tensors)
        )
        return write_message(reply, tensors=tensors, key=self._identity.key)

    def _refuse(self, error: Exception, request_digest: str) -> bytes:
        """A refusal. Errors about this site's own data keep their details at home."""
        codes: list[RefusalCode] = [code for kind, code in _CODES if isinstance(error, kind)]
        code = codes[0] if codes else "malformed"
        if isinstance(error, FedgradeError):
            logger.warning("refused (%s): %s", code, error)
        else:
            logger.error("refused (%s)", code, exc_info=error)
        # Paths and file names of this machine are nobody else's business either.
        private = code in {"data", "ledger"} or not isinstance(error, FedgradeError)
        reason = "this site's own operator can see why in its log" if private else str(error)
        return self._reply(Refusal(code=code, reason=reason[:MAX_REASON]), request_digest)


@dataclass(frozen=True, kw_only=True)
class _OpenJob:
    """A job that was admitted, what this site holds for it, and the rows loaded so far, by side and cohorts."""

    job: TrainingJob
    holdings: Holdings
    rows: dict[tuple[Split, frozenset[str]], SiteRows] = field(default_factory=dict, repr=False)


_CODES: tuple[tuple[type[Exception], RefusalCode], ...] = (
    (PolicyViolated, "policy"),
    (BudgetExceeded, "budget"),
    (AlreadyCharged, "spent"),
    (MessageRefused, "stale"),
    (DataRefused, "data"),
    (LedgerUnavailable, "ledger"),
    (LedgerBroken, "ledger"),
    (ModelRefused, "model"),
)
