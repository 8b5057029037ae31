"""What a site holds: its items by the cohort in which they came in, each under the terms of its own accounts."""

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedgrade.data.manifest import Item, Manifest, Photo, Split, read_manifest
from fedgrade.errors import DataRefused, PolicyViolated
from fedgrade.federation.policy import Policy
from fedgrade.grading import GradeScale
from fedgrade.job import TrainingJob
from fedgrade.model.compute import Compute
from fedgrade.model.spec import ModelSpec, View
from fedgrade.privacy.fixed_point import MAX_PHOTOS
from fedgrade.trust.records import DatasetOpened

MAX_NUMBERS = 2**31  # that a site's items may take as the head sees them, padded to the item with most photos


class PhotoFeatures(Protocol):
    """Where this site's photos live and what turns them into numbers; the door decides."""

    def prepare(self, model: ModelSpec, photos: Sequence[Photo]) -> None:
        """Check every one of ``photos`` and cache its features, so that bad data shows before anything is spent.

        Features are those of every view that training looks at.

        Raises:
            DataRefused: a photo is missing, changed or unreadable.
        """

    @property
    def compute(self) -> Compute:
        """What networks run on here."""

    def features(self, model: ModelSpec, photos: Sequence[Photo], view: View) -> npt.NDArray[np.float32]:
        """Features [photos, dimensions] of ``photos`` as ``view`` shows them, in their order."""

    def inputs(self, model: ModelSpec, photos: Sequence[Photo]) -> npt.NDArray[np.float32]:
        """Network inputs [photos, 3, input, input] of upright ``photos``, in their order."""


@dataclass(frozen=True, kw_only=True)
class CohortData:
    """One batch of items that came in together: their manifest, and how many training items the partner publishes."""

    manifest: bytes
    declared_items: int

    def __repr__(self) -> str:
        return "CohortData(<sensitive>)"


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """What this site holds: sensitive, never sent.

    ``cohorts`` are by name, in any order; ``photos_per_item`` is the most photos the partner lets an item have, a bound
    that it chose and not a count.
    """

    lineage: str
    cohorts: Mapping[str, CohortData]
    photos_per_item: int
    photos: PhotoFeatures

    def __repr__(self) -> str:
        return f"SiteData({self.lineage})"

    @property
    def declared_items(self) -> int:
        """What the partner publishes of its size, all cohorts together."""
        return sum(cohort.declared_items for cohort in self.cohorts.values())


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One cohort, read: its manifest, and the terms under which its accounts stand."""

    manifest: Manifest
    dataset: DatasetOpened


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """Every cohort of a site, read for one scale of grades."""

    cohorts: Mapping[str, Holding]

    @property
    def photos(self) -> tuple[Photo, ...]:
        """Every photo of every cohort."""
        return tuple(photo for holding in self.cohorts.values() for photo in holding.manifest.photos)

    def items(self, split: Split, *, cohorts: frozenset[str]) -> tuple[Item, ...]:
        """The items of one side in ``cohorts``, cohort after cohort."""
        return tuple(item for name in sorted(cohorts) for item in self.cohorts[name].manifest.items(split))

    def declared_items(self, cohorts: frozenset[str]) -> int:
        """What the partner published of the size of ``cohorts``."""
        return sum(self.cohorts[name].dataset.declared_items for name in cohorts)


def read_holdings(data: SiteData, *, grading: GradeScale, policy: Policy, secret: bytes) -> Holdings:
    """``data`` read strictly, by the partner's own ``policy``; ``secret`` keys the commitments to the manifests.

    Raises:
        DataRefused: a manifest is malformed, an item has too many photos, or a source is on both sides.
    """
    # By the partner's own rules, which the job was just held against: whether a manifest passes says nothing that a
    # job could choose to ask.
    read = {
        name: read_manifest(cohort.manifest, grading, synthetic_ceiling=policy.synthetic_ceiling)
        for name, cohort in sorted(data.cohorts.items())
    }
    for manifest in read.values():
        _require_bounded(manifest, photos_per_item=data.photos_per_item)
    _require_sources_apart(read)
    return Holdings(
        cohorts={
            name: Holding(manifest=manifest, dataset=_terms(data, name, manifest, policy=policy, secret=secret))
            for name, manifest in read.items()
        }
    )


def require_room(job: TrainingJob, data: SiteData) -> None:
    """Return if what this site declared leaves room for ``job``: said before anything is charged, by public numbers.

    Raises:
        PolicyViolated: an item may have more photos and views than can be added up, or all of them more than memory.
    """
    model = job.spec.model
    if not model.on_features:
        return
    shown = data.photos_per_item * len(model.views)
    if shown > MAX_PHOTOS:
        raise PolicyViolated(
            f"job {job.spec.name}: shows {len(model.views)} views of each photo, of which this site lets an item have "
            f"{data.photos_per_item}; at most {MAX_PHOTOS} can be added up; ask for fewer model.views"
        )
    numbers = shown * data.declared_items * model.feature_dimensions
    if numbers > MAX_NUMBERS:
        raise PolicyViolated(
            f"job {job.spec.name}: would hold up to {numbers:.1e} numbers in this site's memory; the limit is "
            f"{MAX_NUMBERS:.1e}; ask for fewer model.views, or a lower photos_per_item at this site"
        )


def _require_bounded(manifest: Manifest, *, photos_per_item: int) -> None:
    """Refuse a manifest in which an item has more photos than the partner declared."""
    for split in Split:
        for item in manifest.items(split):
            if len(item.photos) > photos_per_item:
                raise DataRefused(
                    f"item {item.name!r}: has {len(item.photos)} photos; photos_per_item is {photos_per_item}"
                )


def _require_sources_apart(manifests: Mapping[str, Manifest]) -> None:
    """Refuse a physical source that one cohort trains on and another tests on: the test would be too easy."""
    sides: dict[str, tuple[Split, str]] = {}
    for name, source, split in _sources(manifests):
        side, other = sides.setdefault(source, (split, name))
        if side is not split:
            raise DataRefused(
                f"source {source!r}: is for {split.value} in cohort {name} and for {side.value} in cohort {other}; a "
                "source keeps one side in every cohort"
            )


def _sources(manifests: Mapping[str, Manifest]) -> Iterator[tuple[str, str, Split]]:
    for name, manifest in manifests.items():
        for photo in manifest.photos:
            yield name, photo.source, photo.split


def _terms(data: SiteData, name: str, manifest: Manifest, *, policy: Policy, secret: bytes) -> DatasetOpened:
    ceiling = policy.ceiling
    return DatasetOpened(
        lineage=data.lineage,
        cohort=name,
        unit="item",
        adjacency="add_or_remove_one",
        photos_per_item=data.photos_per_item,
        declared_items=data.cohorts[name].declared_items,
        manifest_commitment=hmac.new(secret, manifest.digest.encode(), hashlib.sha256).hexdigest(),
        composition=ceiling.composition,
        epsilon_limit=ceiling.epsilon,
        delta=ceiling.delta,
    )
