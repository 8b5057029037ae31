"""A partner's site: the one method through which anything leaves, and nothing leaves without a charge before it.

The site believes its own files alone: its key, its roster, its policy, its ledger. Everything in a request is checked
against them. It knows no network; a door hands it bytes and carries bytes away.
"""

import hashlib
import hmac
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, assert_never

import numpy as np
import numpy.typing as npt

from fedgrade.data.manifest import Manifest, Photo, Split, read_manifest
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
from fedgrade.federation.charging import Ask, Charging
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
from fedgrade.federation.releases import SiteRows, compute_release
from fedgrade.job import TrainingJob
from fedgrade.model.spec import ModelSpec
from fedgrade.privacy.budget import require_within
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import open_sealed
from fedgrade.trust.identity import Roster, SigningKey, SiteId
from fedgrade.trust.records import DatasetOpened

logger = logging.getLogger(__name__)


class PhotoFeatures(Protocol):
    """Where this site's photos live and what turns them into numbers; the door decides."""

    def prepare(self, model: ModelSpec, manifest: Manifest) -> None:
        """Check every photo of ``manifest`` and cache its features, so that bad data shows before anything is spent.

        Raises:
            DataRefused: a photo is missing, changed or unreadable.
        """

    def features(self, model: ModelSpec, photos: Sequence[Photo]) -> npt.NDArray[np.float32]:
        """Features [photos, dimensions] of ``photos``, in their order."""


MAX_REASON = 1000  # characters


@dataclass(frozen=True, kw_only=True)
class SiteIdentity:
    """Who this site is, and whose word it takes."""

    site: SiteId
    key: SigningKey
    roster: Roster


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """What this site holds: sensitive, never sent.

    ``declared_items`` is what the partner publishes of its size; ``photos_per_item`` is the most photos it lets an item
    have, a bound that it chose and not a count.
    """

    manifest: bytes
    lineage: str
    cohort: str
    declared_items: int
    photos_per_item: int
    photos: PhotoFeatures

    def __repr__(self) -> str:
        return f"SiteData({self.lineage}/{self.cohort})"


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
        self._require_affordable(opened)
        self._data.photos.prepare(opened.job.spec.model, opened.manifest)
        self._members.require_apart(
            opened.manifest, lineage=self._data.lineage, cohort=self._data.cohort, opened=self._charging.opened
        )
        self._charging.open_dataset(opened.dataset)
        self._charging.accept(opened.job, envelope=body.job_envelope)
        self._jobs = {opened.job.digest: opened}
        logger.info("job %s admitted, epsilon %s planned", opened.job.spec.name, opened.job.spec.privacy.target_epsilon)
        return self._reply(Admitted(), request_digest)

    def _contribute(self, request: Opened[Request], body: ContributeRequest, request_digest: str) -> bytes:
        opened = self._opened(request.document.job)
        plan = opened.job.plan
        ask = Ask(job=opened.job.digest, purpose=body.purpose, round_index=body.round_index, attempt=body.attempt)
        if not 0 <= body.round_index < (plan.rounds if body.purpose == "train" else 1) or body.attempt < 0:
            raise MessageRefused(f"{body.purpose} round {body.round_index}: the plan has no such round")
        self._charging.require_fresh(ask, maximum_attempts=self._policy.maximum_attempts)
        head = read_head(request.tensors, opened.job)
        # Charge before any photo is read: a crash may waste budget but can never hide a release.
        reserved = self._charging.reserve(
            ask,
            account=self._charging.account(opened.dataset, partition="test" if body.purpose == "evaluate" else "train"),
            mechanism=plan.mechanism(body.purpose),
            ceiling=self._policy.ceiling,
            weights_digest=request.document.tensors_digest,
        )
        try:
            tensors = compute_release(
                opened.job,
                body.purpose,
                head,
                site=self._identity.site,
                rows=lambda split: self._rows(opened, split),
            )
        except Exception as error:
            self._charging.abort(reserved=reserved, reason=type(error).__name__)
            raise
        receipt = self._charging.commit(ask, reserved=reserved, message_digest=digest(tensors))
        contribution = Contribution(
            purpose=body.purpose, round_index=body.round_index, attempt=body.attempt, receipt=receipt.line.decode()
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
        # By the partner's own rules, which the job was just held against: whether the manifest passes says nothing
        # that a job could choose to ask.
        ceiling = self._policy.synthetic_ceiling
        manifest = read_manifest(self._data.manifest, job.spec.grading, synthetic_ceiling=ceiling)
        self._require_bounded(manifest)
        return _OpenJob(job=job, manifest=manifest, dataset=self._dataset(manifest))

    def _require_bounded(self, manifest: Manifest) -> None:
        """Refuse a manifest in which an item has more photos than the partner declared."""
        for split in Split:
            for item in manifest.items(split):
                if len(item.photos) > self._data.photos_per_item:
                    raise DataRefused(
                        f"item {item.name!r}: has {len(item.photos)} photos; photos_per_item is "
                        f"{self._data.photos_per_item}"
                    )

    def _require_known(self, job: TrainingJob) -> None:
        """Refuse a job with participants whom this site's own roster does not name: they would hide nobody."""
        strangers = [site for site in job.participants if site not in self._identity.roster.sites]
        if strangers:
            raise PolicyViolated(f"job {job.spec.name}: participant {strangers[0]} is not on this site's roster")

    def _opened(self, job_digest: str) -> "_OpenJob":
        if job_digest not in self._jobs:
            # After a restart: the ledger remembers what was admitted, and policy is asked once more.
            opened = self._read_job(self._charging.job_envelope(job_digest))
            # The partner may have moved its ceiling meanwhile; charges must stand under the one on record.
            self._charging.open_dataset(opened.dataset)
            self._jobs = {job_digest: opened}
        return self._jobs[job_digest]

    def _dataset(self, manifest: Manifest) -> DatasetOpened:
        ceiling = self._policy.ceiling
        return DatasetOpened(
            lineage=self._data.lineage,
            cohort=self._data.cohort,
            unit="item",
            adjacency="add_or_remove_one",
            photos_per_item=self._data.photos_per_item,
            declared_items=self._data.declared_items,
            manifest_commitment=hmac.new(self._secret, manifest.digest.encode(), hashlib.sha256).hexdigest(),
            composition=ceiling.composition,
            epsilon_limit=ceiling.epsilon,
            delta=ceiling.delta,
        )

    def _require_affordable(self, opened: "_OpenJob") -> None:
        """Refuse a job that could not be finished within the lifetime budget, before anything is spent on it."""
        plan, job = opened.job.plan, opened.job.digest
        if self._charging.has_begun(job):
            # Shown again by a coordinator that resumes: part of the plan is in the spending already, and what is left
            # meets the ceiling at each reservation.
            return
        train = self._charging.account(opened.dataset, partition="train")
        test = self._charging.account(opened.dataset, partition="test")
        for account, after in (
            (train, plan.charge_training(self._charging.spending(train), job=job)),
            (test, plan.charge_evaluation(self._charging.spending(test), job=job)),
        ):
            require_within(after, ceiling=self._policy.ceiling, account=account)

    def _rows(self, opened: "_OpenJob", split: Split) -> SiteRows:
        if split not in opened.rows:
            items = opened.manifest.items(split)
            features = self._data.photos.features(
                opened.job.spec.model, [photo for item in items for photo in item.photos]
            )
            opened.rows[split] = SiteRows(
                features=features.astype(np.float64),
                item_index=np.repeat(np.arange(len(items)), [len(item.photos) for item in items]),
                grades=np.array([item.grade for item in items], dtype=np.int64),
            )
        return opened.rows[split]

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
    """A job that was admitted, this site's manifest read for it, and the rows loaded so far."""

    job: TrainingJob
    manifest: Manifest
    dataset: DatasetOpened
    rows: dict[Split, SiteRows] = field(default_factory=dict, repr=False)


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
