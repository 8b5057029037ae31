"""A small federation of real parts: photos on disk, ledgers, keys, sites and a coordinator, in one process."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from fedgrade.aggregation.mean import AggregationSpec
from fedgrade.data.manifest import write_manifest
from fedgrade.federation.approvals import Approvals
from fedgrade.federation.charging import Charging
from fedgrade.federation.holdings import CohortData, PhotoFeatures, SiteData
from fedgrade.federation.house_rules import HouseRules
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.messages import (
    AdmitRequest,
    Admitted,
    ContributeRequest,
    Contribution,
    Opened,
    Refusal,
    Reply,
    Request,
    read_message,
    write_message,
)
from fedgrade.federation.outbox import Outbox
from fedgrade.federation.payloads import Head, write_head
from fedgrade.federation.policy import Policy
from fedgrade.federation.release import OpenedRelease, open_release
from fedgrade.federation.rounds import Coordinator, Progress, RoundLog, run_job
from fedgrade.federation.site import Site, SiteIdentity
from fedgrade.federation.store import Folder, RunStore
from fedgrade.federation.witness import Witness
from fedgrade.job import DataSpec, JobSpec, TrainingJob, plan_job
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, ModelSpec
from fedgrade.privacy.plan import DistributedSpec, LocalSgdSpec, LocalSpec, calibrate
from fedgrade.trust.canonical import digest, encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import Roster, SigningKey, SiteId, site_id
from fedgrade.trust.ledger import Entry, LedgerWriter, read_ledger
from fedgrade.trust.records import Reserve
from tests.federation.small_photos import SCALE, ProjectedPhotos, write_photos

DECLARED = 8
MODEL = ModelSpec(
    backbone="tf_efficientnet_lite0", input_size=224, pooling=("average",), weights_digest=LITE0_WEIGHTS_DIGEST
)
PRIVACY = LocalSpec(
    target_epsilon=40.0, delta=1e-5, evaluation_epsilon=40.0, centre_share=0.2, rounds=2, max_grad_norm=1.0
)
SPEC = JobSpec(
    name="small",
    data=DataSpec(asset_type="square", test_fraction=0.5, synthetic_ceiling=0.1, minimum_items=4),
    model=MODEL,
    grading=SCALE,
    privacy=PRIVACY,
    aggregation=AggregationSpec(learning_rate=2.0, momentum=0.5, average_last=0.5, minimum_sites=2),
)
DISTRIBUTED = replace(
    SPEC,
    privacy=DistributedSpec(
        target_epsilon=20.0, floor_epsilon=60.0, delta=1e-5, evaluation_epsilon=40.0, centre_share=0.2, rounds=2,
        max_grad_norm=1.0,
    ),
    aggregation=replace(SPEC.aggregation, method="secure_sum"),
)  # fmt: skip
# Much noise, because little of it takes the accountants longest.
LOCAL_SGD = replace(
    SPEC,
    privacy=LocalSgdSpec(
        target_epsilon=0.5, delta=1e-5, evaluation_epsilon=30.0, centre_share=0.2, rounds=2, max_grad_norm=1.0,
        sampling_rate=0.25, local_steps=2, learning_rate=1.0,
    ),
)  # fmt: skip
POLICY = Policy(
    modes=("local",),
    epsilon_limit=100.0,
    delta=1e-5,
    epsilon_per_job=40.0,
    maximum_rounds=10,
    maximum_attempts=3,
    minimum_participants=2,
    minimum_items=4,
    backbones=("tf_efficientnet_lite0",),
    grades=SCALE.labels,
    synthetic_ceiling=0.1,
    releases=("centre", "train", "evaluate"),
    coordinators=(),
    hours="",
    approval=False,
)
NAMES = (site_id("recycler-a"), site_id("recycler-b"), site_id("recycler-c"))
ONE_COHORT = MappingProxyType({"2026": ("manifest.csv", DECLARED)})
FIRST = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """A second later each time it is asked."""

    def __init__(self) -> None:
        self._asked = 0

    def __call__(self) -> datetime:
        self._asked += 1
        return FIRST + timedelta(seconds=self._asked)


@dataclass(frozen=True, kw_only=True)
class SmallFederation:
    """Folders as a coordinator and its partners keep them, and the keys to act for any of them."""

    root: Path
    roster: Roster
    coordinator_key: SigningKey
    site_keys: Mapping[SiteId, SigningKey]
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def create(cls, root: Path, *, names: Sequence[SiteId] = NAMES) -> "SmallFederation":
        coordinator = SigningKey.generate()
        keys = {name: SigningKey.generate() for name in names}
        roster = Roster(coordinator=coordinator.public, sites={name: key.public for name, key in keys.items()})
        root.mkdir(parents=True, exist_ok=True)
        (root / "roster.json").write_bytes(encode(roster))
        (root / "coordinator").mkdir()
        for number, name in enumerate(names):
            photos = write_photos(root / "sites" / name / "photos", first=1000 * number)
            (root / "sites" / name / "manifest.csv").write_bytes(write_manifest(photos))
        return cls(root=root, roster=roster, coordinator_key=coordinator, site_keys=keys)

    def folder(self, name: SiteId) -> Path:
        return self.root / "sites" / name

    def ledger(self, name: SiteId) -> Path:
        return self.folder(name) / "ledger.jsonl"

    def entries(self, name: SiteId) -> list[Entry]:
        """Every entry of one site's ledger, verified; none before it was first opened."""
        path = self.ledger(name)
        return list(read_ledger(path, key=self.roster.key_of(name))) if path.exists() else []

    def charges(self, name: SiteId) -> list[Reserve]:
        return [entry.body for entry in self.entries(name) if isinstance(entry.body, Reserve)]

    @contextmanager
    def site(
        self,
        name: SiteId = NAMES[0],
        *,
        policy: Policy | Callable[[], Policy] = POLICY,
        photos: PhotoFeatures | None = None,
        cohorts: Mapping[str, tuple[str, int]] = ONE_COHORT,
        photos_per_item: int = 9,
        local_time: datetime = FIRST,
    ) -> Iterator[Site]:
        """One site, its ledger held until the block ends; ``cohorts`` by name: manifest and declared items."""
        folder = self.folder(name)
        data = SiteData(
            lineage=f"squares-{name}",
            cohorts={
                cohort: CohortData(manifest=(folder / manifest).read_bytes(), declared_items=declared)
                for cohort, (manifest, declared) in cohorts.items()
            },
            photos_per_item=photos_per_item,
            photos=photos or ProjectedPhotos(root=folder / "photos"),
        )
        identity = SiteIdentity(site=name, key=self.site_keys[name], roster=self.roster)
        with Charging.open(self.ledger(name), site=name, key=identity.key, clock=self.clock) as charging:
            outbox = Outbox(folder / "outbox")
            yield Site(
                identity=identity,
                data=data,
                rules=HouseRules(
                    policy if callable(policy) else lambda: policy,
                    approvals=self.approvals(name),
                    local_time=lambda: local_time,
                ),
                charging=charging,
                outbox=outbox,
                members=folder / "members.json",
            )

    def approvals(self, name: SiteId = NAMES[0]) -> Approvals:
        """What one site's operator was asked, and said."""
        return Approvals(self.folder(name) / "approvals")

    @contextmanager
    def answers(self, **settings: object) -> Iterator[dict[SiteId, Callable[[bytes], bytes]]]:
        """Every site's door, with the same settings."""
        with ExitStack() as stack:
            yield {name: stack.enter_context(self.site(name, **settings)).answer for name in self.site_keys}

    def job(self, spec: JobSpec = SPEC, *, nonce: str = "0", declared: int = DECLARED) -> TrainingJob:
        """``spec`` planned; ``declared`` are the first site's items."""
        items = {**dict.fromkeys(self.site_keys, DECLARED), NAMES[0]: declared}
        return plan_job(spec, declared_items={name: items[name] for name in self.site_keys}, nonce=nonce)

    def run(
        self,
        job: TrainingJob,
        cohort: object,
        *,
        report: Callable[[Progress], None] = lambda _: None,
        admission_seconds: float = 0.0,
        **surroundings: object,
    ) -> str:
        """Run ``job`` as its coordinator would, from wherever its checkpoint stands."""
        coordinator = Coordinator(
            key=self.coordinator_key,
            witness=self.witness(),
            clock=self.clock,
            report=report,
            admission_seconds=admission_seconds,
            **{"deadline_seconds": 1.0, **surroundings},
        )
        with self.log() as log:
            return run_job(job, cohort, coordinator=coordinator, store=self.store(job), log=log)

    @property
    def coordinator_ledger(self) -> Path:
        return self.root / "coordinator" / "ledger.jsonl"

    def witness(self) -> Witness:
        """What the coordinator saw of the sites' ledgers."""
        return Witness(Folder(self.root / "coordinator" / "witnessed"), roster=self.roster)

    @contextmanager
    def log(self) -> Iterator[RoundLog]:
        """The coordinator's ledger, held until the block ends."""
        log = RoundLog.open(
            lambda observe: LedgerWriter.open(self.coordinator_ledger, key=self.coordinator_key, observe=observe),
            now=self.clock(),
        )
        try:
            yield log
        finally:
            log.close()

    def coordinator_head(self) -> str:
        """The sealed head of the coordinator's ledger, which is begun if there is none."""
        with self.log() as log:
            return log.sealed_head

    def run_in_process(self, job: TrainingJob, **settings: object) -> OpenedRelease:
        """The release of ``job``, every site taking part."""
        with self.answers(**settings) as answers:
            self.run(job, InProcessCohort(sites=answers))
        return self.release(job)

    def store(self, job: TrainingJob) -> RunStore:
        return RunStore(Folder(self.root / "jobs" / job.digest[:16]), key=self.coordinator_key)

    def release(self, job: TrainingJob) -> OpenedRelease:
        return open_release(self.root / "jobs" / job.digest[:16] / "release", signed_by=self.coordinator_key.public)

    def admission(
        self,
        job: TrainingJob,
        *,
        name: SiteId = NAMES[0],
        sealed_by: SigningKey | None = None,
        **changes: str,
    ) -> bytes:
        """The coordinator's message that shows ``job`` to a site, with its own ledger's head and none of the site's."""
        envelope = seal(job, sealed_by or self.coordinator_key).decode()
        body = AdmitRequest(**{"job_envelope": envelope, "seen": "", "ledger": self.coordinator_head(), **changes})
        return self.signed(Request(site=name, job=job.digest, body=body, tensors_digest=digest(b"")), b"")

    def question(
        self, job: TrainingJob, body: ContributeRequest, *, tensors: bytes | None = None, name: SiteId = NAMES[0]
    ) -> bytes:
        """The coordinator's message that asks a site for a release; by default at weights of zero."""
        arrays = zero_head(job) if tensors is None else tensors
        return self.signed(Request(site=name, job=job.digest, body=body, tensors_digest=digest(arrays)), arrays)

    def signed(self, request: Request, tensors: bytes) -> bytes:
        return write_message(request, tensors=tensors, key=self.coordinator_key)

    def opened(self, reply: bytes, *, name: SiteId = NAMES[0]) -> Opened[Reply]:
        """A reply whose signature holds."""
        return read_message(reply, as_=Reply, signed_by=self.roster.key_of(name))


def told(federation: SmallFederation, site: Site, message: bytes) -> Admitted | Contribution | Refusal:
    """What the first site says to ``message``: the body of its signed reply."""
    return federation.opened(site.answer(message)).document.body


def refusal(federation: SmallFederation, site: Site, message: bytes) -> tuple[str, str]:
    """Code and reason of a refusal by the first site that left nothing in its ledger."""
    before = federation.ledger(NAMES[0]).read_bytes()
    body = told(federation, site, message)
    assert federation.ledger(NAMES[0]).read_bytes() == before
    assert isinstance(body, Refusal)
    return body.code, body.reason


def refusal_and_log(
    federation: SmallFederation, site: Site, message: bytes, caplog: pytest.LogCaptureFixture
) -> tuple[str, str, str]:
    """What the coordinator is told, and what the partner's own log says."""
    with caplog.at_level(logging.WARNING):
        return *refusal(federation, site, message), caplog.text


def zero_head(job: TrainingJob) -> bytes:
    shape = job.head_shape()
    return write_head(Head(thresholds=np.zeros(shape), centre=np.zeros(shape[1] - 1)))


def ask(purpose: str, round_index: int = 0, attempt: int = 0) -> ContributeRequest:
    return ContributeRequest(purpose=purpose, round_index=round_index, attempt=attempt)


def with_privacy(**changes: object) -> JobSpec:
    """The small job with some of its privacy spec changed."""
    return replace(SPEC, privacy=replace(PRIVACY, **changes))


calibrate_once = cache(calibrate)


def zeros(size: int, *, scale: int) -> np.ndarray:
    """No noise at all, where a test needs exact answers; the product has no such switch."""
    del scale
    return np.zeros(size, dtype=np.int64)


def quick_noise(size: int, *, scale: int) -> np.ndarray:
    """Fresh noise of about the right size, a hundred times faster than the exact one."""
    return np.random.default_rng().normal(scale=scale, size=size).astype(np.int64)
