"""A training job: every spec composed, solved and ready to be sealed. Knows no network, no site and no photo.

``conf/`` mirrors :class:`JobSpec` field by field. :func:`plan_job` adds what follows from it and from who takes part;
the result is sealed by the coordinator, and nothing about it can change afterwards.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from fedgrade.aggregation.mean import AggregationSpec
from fedgrade.aggregation.secure_sum.documents import MAX_RECOVERY_SITES
from fedgrade.errors import JobRefused
from fedgrade.grading import GradeScale
from fedgrade.model.spec import ModelSpec
from fedgrade.privacy.grid import LARGEST_SUM
from fedgrade.privacy.plan import PrivacyPlan, PrivacySpec, calibrate
from fedgrade.trust.canonical import digest, encode
from fedgrade.trust.identity import SiteId, site_id
from fedgrade.trust.records import Mechanism, PoissonGaussian

MIN_ITEMS = 2  # at a site
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_MAX_SITES = 1000
# Delta stays well below one over the number of items it protects.
_DELTA_MARGIN = 10
_DEVIATIONS = 10  # that noise passes in no lifetime


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a site's data must be to take part.

    Attributes:
        asset_type: what is inspected, in the words of the manifests.
        test_fraction: part of each site's sources held out; a source is a physical thing, never split between sides.
        synthetic_ceiling: largest part of a training set that may be synthetic; evaluation takes real photos only.
        minimum_items: a site with fewer training items stays out; its noise would drown it.
    """

    asset_type: str
    test_fraction: float
    synthetic_ceiling: float
    minimum_items: int

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise JobRefused(f"data.test_fraction: {self.test_fraction} must be above 0 and below 1")
        if not 0 <= self.synthetic_ceiling <= 1:
            raise JobRefused(f"data.synthetic_ceiling: {self.synthetic_ceiling} must be in [0, 1]")
        if self.minimum_items < MIN_ITEMS:
            raise JobRefused(
                f"data.minimum_items: {self.minimum_items} must be at least {MIN_ITEMS}; a single item has none to "
                "hide among"
            )


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What the coordinator wishes for, as written in ``conf/``."""

    name: str
    data: DataSpec
    model: ModelSpec
    grading: GradeScale
    privacy: PrivacySpec
    aggregation: AggregationSpec

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise JobRefused(f"name: {self.name[:80]!r} must be 1 to 63 of a-z, 0-9, '.', '_' and '-'")
        if self.model.trainable != "head" and self.privacy.mode != "local_sgd":
            raise JobRefused(
                f"model.trainable: {self.model.trainable!r} needs privacy.mode 'local_sgd'; privacy.mode "
                f"{self.privacy.mode!r} trains the head alone, whose full-batch gradients are exact"
            )
        method = self.aggregation.method
        if self.privacy.mode == "distributed" and method != "secure_sum":
            raise JobRefused(
                f"aggregation.method: {method!r} would show the coordinator each upload, and privacy.mode "
                "'distributed' puts a share of the noise into each; choose aggregation=secure_sum, or privacy=local"
            )
        if self.privacy.mode == "local_sgd" and method == "secure_sum":
            raise JobRefused(
                "aggregation.method: 'secure_sum' adds integers, and privacy.mode 'local_sgd' uploads floating-point "
                "updates; choose aggregation=mean"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A job that can be sealed: the wish, who takes part, and the privacy plan that follows.

    ``declared_items`` maps each participant to the number of training items it chose to publish; it scales the mean
    and weighs the sites, and reveals only what the partner declared. ``nonce`` keeps two runs of one wish apart.
    """

    spec: JobSpec
    declared_items: dict[SiteId, int]
    plan: PrivacyPlan
    nonce: str

    def __post_init__(self) -> None:
        if len(self.declared_items) > _MAX_SITES:
            raise JobRefused(f"participants: {len(self.declared_items)}; the limit is {_MAX_SITES}")
        for site, items in self.declared_items.items():
            site_id(site)
            if items < self.spec.data.minimum_items:
                raise JobRefused(f"participant {site}: {items} items; data.minimum_items asks for more")
            if self.plan.delta > Fraction(1, _DELTA_MARGIN * items):
                raise JobRefused(
                    f"privacy.delta: {float(self.plan.delta):g} is too large for the {items} items of {site}; "
                    f"at most 1/(10 n) = {1 / (_DELTA_MARGIN * items):.1e}"
                )
        if self.spec.aggregation.minimum_sites > len(self.declared_items):
            raise JobRefused(
                f"aggregation.minimum_sites: {self.spec.aggregation.minimum_sites} exceeds the "
                f"{len(self.declared_items)} participants"
            )
        _require_dropouts(self.spec.aggregation.tolerate_dropouts, len(self.declared_items))
        _require_room(self.plan.train, self.declared_items)
        if self.plan != _plan(self.spec, len(self.declared_items)):
            raise JobRefused("plan: is not the one that follows from the job's own privacy spec and participants")

    @property
    def participants(self) -> tuple[SiteId, ...]:
        """Who takes part, in one fixed order."""
        return tuple(sorted(self.declared_items))

    @property
    def digest(self) -> str:
        """What messages, ledgers and releases name this job by."""
        return digest(encode(self))

    @property
    def noise_shares(self) -> int:
        """How many sites' noise the plan counts on in every sum."""
        return _noise_shares(self.spec, len(self.declared_items))

    def head_shape(self) -> tuple[int, int]:
        """Shape of the head's weights: thresholds between grades, by features and one bias."""
        return self.spec.grading.grades - 1, self.spec.model.feature_dimensions + 1

    @property
    def parameters(self) -> int:
        """How many numbers are trained: the head's thresholds, then those of the adapter or network, if any."""
        thresholds, inputs = self.head_shape()
        return thresholds * inputs + self.spec.model.network_parameters


def plan_job(spec: JobSpec, *, declared_items: dict[SiteId, int], nonce: str) -> TrainingJob:
    """``spec`` with its privacy plan solved for these participants.

    Raises:
        PlanRefused: no plan meets the spec.
        JobRefused: the parts do not go together.
    """
    return TrainingJob(spec=spec, declared_items=declared_items, plan=_plan(spec, len(declared_items)), nonce=nonce)


def _plan(spec: JobSpec, participants: int) -> PrivacyPlan:
    """The plan on which ``spec`` keeps its target whoever answers."""
    shares = _noise_shares(spec, participants)
    return calibrate(spec.privacy, participants=shares if spec.privacy.mode == "distributed" else participants)


def _noise_shares(spec: JobSpec, participants: int) -> int:
    """Shares of noise are counted on for no more sites than must answer: a round is closed without the others."""
    return min(participants, spec.aggregation.minimum_sites) if spec.privacy.mode == "distributed" else 1


def _require_room(mechanism: Mechanism, declared_items: dict[SiteId, int]) -> None:
    """Return if an honest site's release fits its part of a 64-bit sum, even where all items pull the same way."""
    if isinstance(mechanism, PoissonGaussian):
        return
    most, sites = max(declared_items.values(), default=0), len(declared_items)
    if sites * (most * mechanism.sensitivity + _DEVIATIONS * mechanism.scale) > LARGEST_SUM:
        raise JobRefused(
            f"participants: {sites} sites of up to {most} items, with noise of {mechanism.scale} on a grid of "
            f"{mechanism.sensitivity}; their sum may not fit 64 bits; name fewer sites, or allow a larger epsilon"
        )


def _require_dropouts(tolerated: int, participants: int) -> None:
    if tolerated and (3 * tolerated >= participants or participants > MAX_RECOVERY_SITES):
        raise JobRefused(
            f"aggregation.tolerate_dropouts: {tolerated} of {participants} participants; three times it must be below "
            f"them, and they at most {MAX_RECOVERY_SITES}"
        )
