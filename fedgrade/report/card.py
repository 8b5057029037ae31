"""The model card: what a release grades, how well, at what cost in privacy, and what it is not for; one page.

Made from what verification proved and the registry lists. Same release, same bytes: nothing in it depends on when it is
written. After Mitchell et al. (2019), https://arxiv.org/abs/1810.03993.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedgrade.errors import DocumentRefused
from fedgrade.federation.bundle import BundledFile
from fedgrade.federation.registry import RegisteredRelease
from fedgrade.federation.release import OpenedRelease
from fedgrade.federation.rounds import stages_of
from fedgrade.federation.verification import FederationProof, JobProof
from fedgrade.grading import GradeScale
from fedgrade.job import TrainingJob
from fedgrade.report.observers import ObserverRow, observer_rows, site_rows
from fedgrade.report.page import rendered
from fedgrade.report.quality import Quality, cell_deviation, metric_deviation, quality
from fedgrade.report.releases import uses_floating_point
from fedgrade.report.words import SUPERSCRIPTS, grouped, plain

MAX_LICENCE = 200  # characters
_SMALLEST = 1e-9
_TRAINED = {
    "head": "a head on its frozen features",
    "adapter": "an adapter and a head on its frozen features",
    "norms": "scale and shift of its norms, and a head",
    "network": "all of it, and a head",
}


@dataclass(frozen=True, kw_only=True)
class Contributor:
    """One partner: what it declared of its size, and how many stages it answered; texts, ready to print."""

    site: str
    declared_items: str
    share: str
    stages: str


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One true grade and what it costs to give each grade to such an item."""

    label: str
    critical: bool
    costs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """One earlier release of the same asset type."""

    name: str
    published: str
    kappa: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class FileRow:
    """One file of the bundle."""

    name: str
    size: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """Standard deviations of the headline figures, privacy noise and the chance of the sample together."""

    miss: str
    accuracy: str
    kappa: str


@dataclass(frozen=True, kw_only=True)
class CardJob:
    """The job as the parts that the card shares with the privacy report want it."""

    observers: tuple[ObserverRow, ...]
    quality: Quality


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What a card says beside what the federation proved.

    Attributes:
        earlier: releases before this one for the same asset type, newest first.
        difference: the largest between a probability of the ONNX file and the release's own.
        licence: the coordinator's words on what users of the model may do; empty if it has none.
        files: of the bundle, but the card itself and the index.
    """

    earlier: tuple[RegisteredRelease, ...]
    difference: float
    licence: str
    files: Mapping[str, BundledFile]

    def __post_init__(self) -> None:
        if len(self.licence) > MAX_LICENCE or not self.licence.isprintable():
            raise DocumentRefused(f"licence: at most {MAX_LICENCE} printable characters on one line")


def model_card(job: JobProof, proof: FederationProof, publication: Publication) -> str:
    """The card of the release of ``job``, as one HTML document.

    Raises:
        DocumentRefused: the job has no release, or nobody evaluated it.
    """
    measured, release = quality(job), job.release
    if measured is None or release is None:
        raise DocumentRefused(f"job {job.job.digest[:16]}: no release that anyone evaluated; there is nothing to say")
    spec, participants = job.job.spec, job.job.participants
    return rendered(
        "card.html.j2",
        name=plain(spec.name),
        asset_type=plain(spec.data.asset_type),
        published=plain(release.release.published)[:16].replace("T", " ") + " UTC",
        job=CardJob(observers=observer_rows(job), quality=measured),
        uncertainty=_uncertainty(job, release),
        cost_rows=_cost_rows(spec.grading),
        contributors=_contributors(job.job, release),
        unproved=tuple(site for site in participants if site not in proof.sites),
        one_price=len({row.epsilons for row in site_rows(job)}) == 1,
        floating_point=uses_floating_point(job),
        data=spec.data,
        held_out=f"{100 * spec.data.test_fraction:g} %",
        synthetic=f"{100 * spec.data.synthetic_ceiling:g} %",
        model=spec.model,
        trained=_TRAINED[spec.model.trainable],
        backbone_weights=grouped(spec.model.weights_digest),
        release_digest=grouped(release.digest),
        job_digest=grouped(job.job.digest),
        coordinator=proof.roster.coordinator.fingerprint,
        licence=publication.licence,
        difference=_power_of_ten(publication.difference),
        earlier=_ancestors(publication.earlier),
        files=_files(publication.files),
    )


def _uncertainty(job: JobProof, release: OpenedRelease) -> Uncertainty:
    evaluated = next(closed for closed in reversed(job.rounds) if closed.purpose == "evaluate")
    noise = cell_deviation(job, sites=len(evaluated.receipts))
    found = metric_deviation(release.release.counts, job.job.spec.grading, deviation=noise, sampled=True)
    return Uncertainty(
        miss=f"{100 * found.critical_miss_rate:.1f}",
        accuracy=f"{100 * found.accuracy:.1f}",
        kappa=f"{found.quadratic_weighted_kappa:.2f}",
    )


def _power_of_ten(difference: float) -> str:
    """The power of ten that ``difference`` does not exceed: chance moves its digits, and must not move the page's."""
    exponent = math.ceil(math.log10(max(difference, _SMALLEST)))
    return f"10{str(exponent).translate(SUPERSCRIPTS)}"


def _cost_rows(scale: GradeScale) -> tuple[CostRow, ...]:
    return tuple(
        CostRow(label=plain(label), critical=label in scale.critical, costs=tuple(f"{cost:g}" for cost in row))
        for label, row in zip(scale.labels, scale.cost, strict=True)
    )


def _contributors(job: TrainingJob, release: OpenedRelease) -> tuple[Contributor, ...]:
    total, stages = sum(job.declared_items.values()), len(stages_of(job))
    return tuple(
        Contributor(
            site=site,
            declared_items=f"{job.declared_items[site]:,}",
            share=f"{job.declared_items[site] / total:.0%}".replace("%", " %"),
            stages=f"{release.release.contributions.get(site, 0):,} of {stages:,}",
        )
        for site in job.participants
    )


def _ancestors(earlier: Sequence[RegisteredRelease]) -> tuple[Ancestor, ...]:
    return tuple(
        Ancestor(
            name=plain(one.name),
            published=plain(one.published)[:10],
            kappa=f"{one.metrics.quadratic_weighted_kappa:.3f}",
            digest=grouped(one.digest),
        )
        for one in earlier
    )


def _files(files: Mapping[str, BundledFile]) -> tuple[FileRow, ...]:
    return tuple(
        FileRow(name=name, size=f"{file.size:,}", digest=grouped(file.digest)) for name, file in sorted(files.items())
    )
