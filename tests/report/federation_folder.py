"""A federation's folder, written through the real ledgers, receipts and releases; only the arrays are made up.

The report sees digests of what sites released, so random bytes stand for it; everything that a verifier looks at is
signed, chained and charged by the code that does it in production.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np

from fedgrade.aggregation.mean import AggregationSpec, sum_of_releases
from fedgrade.evaluation import ConfusionCounts, metrics
from fedgrade.federation.charging import Ask, Charging
from fedgrade.federation.payloads import Head, read_release, write_head
from fedgrade.federation.release import ModelRelease, publish
from fedgrade.federation.rounds import RoundLog, stages_of
from fedgrade.federation.store import Folder, RunStore
from fedgrade.grading import GradeScale
from fedgrade.job import DataSpec, JobSpec, TrainingJob, plan_job
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, ModelSpec
from fedgrade.model.weights import write_weights
from fedgrade.privacy.budget import Ceiling
from fedgrade.privacy.grid import from_grid
from fedgrade.privacy.plan import LocalSpec, PrivacySpec
from fedgrade.trust.canonical import digest, encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import Roster, SigningKey, SiteId
from fedgrade.trust.ledger import LedgerWriter
from fedgrade.trust.records import DatasetOpened, LedgerState, RoundClosed
from fedgrade.trust.transparency import open_head

SITES = ("bremen", "gdansk", "limerick", "rotterdam", "turin")
SCALE = GradeScale(
    name="cells",
    labels=("sound", "slight wear", "worn", "defective"),
    critical=("defective",),
    cost=((0, 1, 2, 3), (1, 0, 1, 2), (4, 2, 0, 1), (12, 8, 3, 0)),
)
LOCAL = LocalSpec(
    target_epsilon=3.0, delta=1e-5, evaluation_epsilon=1.0, centre_share=0.1, rounds=20, max_grad_norm=1.0
)
# A plausible grader on 520 held-out items, [true grade, decided grade].
TRUE_COUNTS = np.array([[251, 38, 8, 5], [17, 26, 12, 4], [2, 5, 9, 5], [6, 9, 17, 106]], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Story:
    """What happens in one job: who is silent when, and whose attempts fail."""

    name: str = "cells-pilot"
    privacy: PrivacySpec = LOCAL
    scale: GradeScale = SCALE
    sites: tuple[str, ...] = SITES
    silent: frozenset[tuple[str, int]] = frozenset()  # (site, stage)
    aborted: frozenset[tuple[str, int]] = frozenset()
    repeated: frozenset[tuple[str, int]] = frozenset()
    published: bool = True
    stop_after: int = 10_001  # stages


@dataclass
class Workshop:
    """Keys, clocks and open ledgers while a folder is being written."""

    folder: Path
    sites: tuple[str, ...] = SITES
    cohort: str = "2026-spring"
    epsilon_limits: dict[str, float] = field(default_factory=dict)
    composition: str = "zcdp"

    def __post_init__(self) -> None:
        self.key = SigningKey.generate()
        self.site_keys = {SiteId(site): SigningKey.generate() for site in self.sites}
        self.roster = Roster(
            coordinator=self.key.public, sites={site: key.public for site, key in self.site_keys.items()}
        )
        self.rng = np.random.default_rng(7)
        self._now = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)
        (self.folder / "coordinator").mkdir(parents=True)
        (self.folder / "roster.json").write_bytes(encode(self.roster))
        self.charging = {site: self._open_ledger(site) for site in self.site_keys}
        self.datasets = {site: self._open_dataset(site) for site in self.site_keys}
        path = self.folder / "coordinator" / "ledger.jsonl"
        self.log = RoundLog.open(
            lambda observe: LedgerWriter.open(path, key=self.key, observe=observe), now=self.clock()
        )

    def clock(self) -> datetime:
        self._now += timedelta(seconds=7)
        return self._now

    def state(self, site: SiteId) -> LedgerState:
        """Where the ledger of ``site`` stands."""
        sealed = self.charging[site].sealed_head.encode()
        return open_head(sealed, owner=site, signed_by=self.site_keys[site].public).state

    def close(self) -> None:
        for charging in self.charging.values():
            charging.close()
        self.log.close()

    def _open_ledger(self, site: SiteId) -> Charging:
        folder = self.folder / "sites" / site
        folder.mkdir(parents=True)
        return Charging.open(folder / "ledger.jsonl", site=site, key=self.site_keys[site], clock=self.clock)

    def _open_dataset(self, site: SiteId) -> DatasetOpened:
        dataset = DatasetOpened(
            lineage="intake",
            cohort=self.cohort,
            unit="item",
            adjacency="add_or_remove_one",
            photos_per_item=3,
            declared_items=declared_items(site),
            manifest_commitment=digest(site.encode()),
            composition=self.composition,
            epsilon_limit=Fraction(repr(self.epsilon_limits.get(site, 8.0))),
            delta=Fraction(1, 10**5),
        )
        self.charging[site].open_dataset(dataset)
        return dataset


def declared_items(site: str) -> int:
    return 300 + 40 * (len(site) % 6)


def write_federation(folder: Path, *stories: Story, **terms: object) -> Workshop:
    """Play ``stories`` one after another into a new federation at ``folder``; default is one clean job."""
    workshop = Workshop(folder=folder, **terms)
    try:
        for story in stories or (Story(),):
            play(story, workshop)
    finally:
        workshop.close()
    return workshop


def play(story: Story, workshop: Workshop) -> TrainingJob:
    """One job from admission to release."""
    job = _job(story, workshop)
    envelope = seal(job, workshop.key).decode()
    for site in job.participants:
        charging, dataset = workshop.charging[site], workshop.datasets[site]
        sides = tuple(charging.account(dataset, partition=partition) for partition in ("train", "test"))
        charging.accept(job, envelope=envelope, accounts=sides)
        charging.witness(workshop.log.sealed_head)
    store = RunStore(Folder(workshop.folder / "jobs" / job.digest[:16]), key=workshop.key)
    heads, contributions = _heads(job, workshop), dict.fromkeys(job.participants, 0)
    before = next(heads)
    for index, stage in enumerate(stages_of(job)[: story.stop_after]):
        after = before if stage.purpose == "evaluate" else next(heads)
        ask = Ask(job=job.digest, purpose=stage.purpose, round_index=stage.round_index, attempt=0)
        receipts, ledgers, tensors = {}, {}, {}
        for site in job.participants:
            raw = _evaluated(job, workshop) if stage.purpose == "evaluate" else workshop.rng.bytes(64)
            shown = digest(write_head(before))
            line = _answer(job, ask, site, workshop, story=story, index=index, weights=shown, raw=raw)
            if line is not None:
                receipts[site], tensors[site] = line, raw
                ledgers[site] = workshop.state(site)
                contributions[site] += 1
        store.keep_receipts(index, receipts)
        if stage.purpose == "evaluate":
            store.keep_evaluation(tensors, None)
        closed = RoundClosed(
            job=job.digest,
            round_index=stage.round_index,
            attempt=0,
            purpose=stage.purpose,
            receipts={site: digest(line) for site, line in receipts.items()},
            ledgers=ledgers,
            weights_before=digest(write_head(before)),
            weights_after=digest(write_head(after)),
        )
        workshop.log.close_round(closed, now=workshop.clock())
        before = after
    if story.published:
        counted = {site: number for site, number in contributions.items() if number}
        _publish(job, before, counted, tensors, store=store, workshop=workshop)
    return job


def _job(story: Story, workshop: Workshop) -> TrainingJob:
    spec = JobSpec(
        name=story.name,
        data=DataSpec(asset_type="solar cell", test_fraction=0.2, synthetic_ceiling=0.0, minimum_items=50),
        model=ModelSpec(
            backbone="tf_efficientnet_lite0",
            input_size=224,
            pooling=("average",),
            weights_digest=LITE0_WEIGHTS_DIGEST,
        ),
        grading=story.scale,
        privacy=story.privacy,
        aggregation=AggregationSpec(learning_rate=0.5, momentum=0.9, average_last=0.5, minimum_sites=2),
    )
    items = {SiteId(site): declared_items(site) for site in story.sites}
    return plan_job(spec, declared_items=items, nonce=workshop.rng.bytes(8).hex())


def _heads(job: TrainingJob, workshop: Workshop) -> Iterator[Head]:
    thresholds, inputs = job.head_shape()
    while True:
        yield Head(thresholds=workshop.rng.normal(size=(thresholds, inputs)), centre=np.zeros(inputs - 1))


def _answer(
    job: TrainingJob,
    ask: Ask,
    site: SiteId,
    workshop: Workshop,
    *,
    story: Story,
    index: int,
    weights: str,
    raw: bytes,
) -> bytes | None:
    """The receipt that the coordinator gets, if it gets one."""
    place = (str(site), index)
    if place in story.silent:
        return None
    reserve = _reserver(job, site, workshop, weights=weights)
    if place in story.aborted:
        workshop.charging[site].abort(reserved=reserve(ask), reason="DataRefused")
        ask = _again(ask)
    if place in story.repeated:
        workshop.charging[site].commit(ask, reserved=reserve(ask), message_digest=digest(workshop.rng.bytes(64)))
        ask = _again(ask)
    committed = workshop.charging[site].commit(ask, reserved=reserve(ask), message_digest=digest(raw))
    return committed.line


def _again(ask: Ask) -> Ask:
    return Ask(job=ask.job, purpose=ask.purpose, round_index=ask.round_index, attempt=ask.attempt + 1)


def _reserver(job: TrainingJob, site: SiteId, workshop: Workshop, *, weights: str) -> Callable[[Ask], object]:
    charging, dataset = workshop.charging[site], workshop.datasets[site]
    ceiling = Ceiling(epsilon=dataset.epsilon_limit, delta=dataset.delta, composition=dataset.composition)

    def reserve(ask: Ask) -> object:
        return charging.reserve(
            ask,
            accounts=(charging.account(dataset, partition="test" if ask.purpose == "evaluate" else "train"),),
            mechanism=job.plan.mechanism(ask.purpose),
            ceiling=ceiling,
            weights_digest=weights,
        )

    return reserve


def _evaluated(job: TrainingJob, workshop: Workshop) -> bytes:
    """One site's share of the counts, on the grid and under noise of the right size."""
    grades, mechanism = job.spec.grading.grades, job.plan.evaluate
    share = np.resize(TRUE_COUNTS, (grades, grades)) / len(job.participants) * mechanism.sensitivity
    noisy = share + workshop.rng.normal(0.0, mechanism.scale, size=(grades, grades))
    return write_weights({"release": noisy.ravel().astype(np.int64)}, metadata={})


def _publish(
    job: TrainingJob,
    head: Head,
    contributions: dict[SiteId, int],
    evaluated: dict[SiteId, bytes],
    *,
    store: RunStore,
    workshop: Workshop,
) -> None:
    grades = job.spec.grading.grades
    releases = [read_release(raw, job, "evaluate", site=site) for site, raw in evaluated.items()]
    total = from_grid(sum_of_releases(releases), max_norm=1.0, mechanism=job.plan.evaluate)
    counts = ConfusionCounts.of(total.reshape(grades, grades))
    release = ModelRelease(
        job=job,
        weights_digest=digest(write_head(head)),
        counts=counts,
        metrics=metrics(counts, job.spec.grading),
        contributions=contributions,
        published=workshop.clock().isoformat(timespec="seconds"),
    )
    signed = publish(release, head, to=store.release, key=workshop.key)
    workshop.log.release(job, signed, now=workshop.clock())
