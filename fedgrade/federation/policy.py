"""The partner's own ceilings. A job can only ask; this file, on the partner's machine, has the last word.

Nothing here is ever read from the wire, and nothing a job says can widen it.
"""

import re
from dataclasses import dataclass
from datetime import time
from fractions import Fraction
from typing import Literal

from fedgrade.errors import DocumentRefused, PolicyViolated, SiteWaits
from fedgrade.job import MIN_ITEMS, TrainingJob
from fedgrade.privacy.accounting import MIN_DELTA, printed
from fedgrade.privacy.budget import Ceiling, Spending
from fedgrade.privacy.plan import exact
from fedgrade.trust.identity import PublicKey, SiteId
from fedgrade.trust.records import Composition, Purpose

Mode = Literal["local", "distributed", "local_sgd"]
_HOURS = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a partner allows, for any job and for the life of its data.

    Attributes:
        modes: privacy modes this partner takes part in. With ``local_sgd`` among them, accounts are opened as
            ``mixed``, which turns the same charges into a slightly larger epsilon.
        epsilon_limit: ceiling on epsilon for each account, over all jobs there will ever be.
        delta: the delta at which that ceiling is measured.
        epsilon_per_job: the most that one job may plan to spend.
        maximum_rounds: the most rounds one job may have.
        maximum_attempts: how often one round may be asked for anew; every attempt is charged.
        minimum_participants: fewer partners than this, and the sum says too much about each.
        minimum_items: with fewer items of one's own, stay out.
        backbones: architectures this partner runs.
        grades: labels this partner grades by, best to worst; a job with others is refused before the manifest is read,
            so that jobs cannot ask about single labels.
        synthetic_ceiling: largest share of synthetic training photos in this partner's own manifest; a job that wants
            less is refused unread, for the same reason.
        releases: what this partner lets its items be asked for; without ``evaluate`` it trains and is not measured on.
        coordinators: fingerprints of coordinators it works for; none named, whichever its roster names.
        hours: when it answers, by its machine's own clock, as ``20:00-06:00``; empty for always.
        approval: whether a person must approve each job before this site takes part.
    """

    modes: tuple[Mode, ...]
    epsilon_limit: float
    delta: float
    epsilon_per_job: float
    maximum_rounds: int
    maximum_attempts: int
    minimum_participants: int
    minimum_items: int
    backbones: tuple[str, ...]
    grades: tuple[str, ...]
    synthetic_ceiling: float
    releases: tuple[Purpose, ...]
    coordinators: tuple[str, ...]
    hours: str
    approval: bool

    def __post_init__(self) -> None:
        for name in ("epsilon_limit", "epsilon_per_job"):
            if not 0 < getattr(self, name) < float("inf"):
                raise DocumentRefused(f"policy.{name}: {getattr(self, name)} must be above 0")
        if not MIN_DELTA <= exact(self.delta) < 1:
            raise DocumentRefused(f"policy.delta: {self.delta} must be at least 1e-9 and below 1")
        if not 0 <= self.synthetic_ceiling <= 1:
            raise DocumentRefused(f"policy.synthetic_ceiling: {self.synthetic_ceiling} must be in [0, 1]")
        if self.minimum_items < MIN_ITEMS:
            raise DocumentRefused(
                f"policy.minimum_items: {self.minimum_items} must be at least {MIN_ITEMS}; a single item has none to "
                "hide among"
            )
        for name in ("maximum_rounds", "maximum_attempts", "minimum_participants"):
            if getattr(self, name) < 1:
                raise DocumentRefused(f"policy.{name}: {getattr(self, name)} must be at least 1")
        self._require_habits()

    def _require_habits(self) -> None:
        if self.hours and (not _HOURS.fullmatch(self.hours) or len(set(self.hours.split("-"))) == 1):
            raise DocumentRefused(f"policy.hours: {self.hours[:40]!r} must be like 20:00-06:00, or empty for always")
        for fingerprint in self.coordinators:
            if not PublicKey.is_fingerprint(fingerprint):
                raise DocumentRefused(
                    f"policy.coordinators: {fingerprint[:80]!r} must be a fingerprint as `fedgrade site join` shows"
                )

    @property
    def composition(self) -> Composition:
        """What kind of accounts this partner opens."""
        return "mixed" if "local_sgd" in self.modes else "zcdp"

    @property
    def ceiling(self) -> Ceiling:
        """The lifetime limit on each account."""
        return Ceiling(epsilon=exact(self.epsilon_limit), delta=exact(self.delta), composition=self.composition)


def require_open(policy: Policy, now: time) -> None:
    """Return if a site with ``policy`` answers at the time of day ``now``.

    Raises:
        SiteWaits: it does not, and says when it will.
    """
    if not policy.hours:
        return
    begin, end = (time.fromisoformat(text) for text in policy.hours.split("-"))
    # Over midnight, the open hours are those outside of end to begin.
    within = begin <= now < end if begin < end else now >= begin or now < end
    if not within:
        raise SiteWaits(f"this site answers in its policy.hours, {policy.hours} by its own clock")


def require_coordinator(policy: Policy, key: PublicKey) -> None:
    """Return if ``policy`` lets its site work for the coordinator with ``key``.

    Raises:
        PolicyViolated: it names others.
    """
    if policy.coordinators and not any(key.has_fingerprint(text) for text in policy.coordinators):
        raise PolicyViolated(f"coordinator {key.fingerprint} is not among policy.coordinators")


def require_release(policy: Policy, purpose: Purpose) -> None:
    """Return if ``policy`` lets its site's items be asked for ``purpose``.

    Raises:
        PolicyViolated: it does not.
    """
    if purpose not in policy.releases:
        raise PolicyViolated(f"{purpose} is not among policy.releases {list(policy.releases)}")


def admit(job: TrainingJob, *, policy: Policy, site: SiteId, declared_items: int) -> None:
    """Return if ``policy`` lets ``site`` take part in ``job``.

    Raises:
        PolicyViolated: names the first rule that the job breaks, its value and the limit.
    """
    plan, spec = job.plan, job.spec
    rules: tuple[tuple[bool, str], ...] = (
        (site in job.declared_items, f"site {site} is not among the participants"),
        (
            job.declared_items.get(site) == declared_items,
            f"the job says this site declared {job.declared_items.get(site)} items; it declared {declared_items}",
        ),
        (
            {"centre", "train"} <= set(policy.releases),
            f"policy.releases {list(policy.releases)} are not enough to train; centre and train are needed",
        ),
        (plan.mode in policy.modes, f"privacy.mode {plan.mode!r} is not among policy.modes {list(policy.modes)}"),
        (
            plan.delta <= exact(policy.delta),
            f"privacy.delta {float(plan.delta):g} exceeds policy.delta {policy.delta:g}",
        ),
        (
            plan.rounds <= policy.maximum_rounds,
            f"privacy.rounds {plan.rounds} exceeds policy.maximum_rounds {policy.maximum_rounds}",
        ),
        (
            len(job.declared_items) >= policy.minimum_participants,
            f"{len(job.declared_items)} participants; policy.minimum_participants is {policy.minimum_participants}",
        ),
        (
            spec.model.backbone in policy.backbones,
            f"model.backbone {spec.model.backbone!r} is not among policy.backbones {list(policy.backbones)}",
        ),
        (
            spec.grading.labels == policy.grades,
            f"grading.labels {list(spec.grading.labels)} are not policy.grades {list(policy.grades)}",
        ),
        (
            spec.data.synthetic_ceiling >= policy.synthetic_ceiling,
            f"data.synthetic_ceiling {spec.data.synthetic_ceiling} is below the policy's {policy.synthetic_ceiling}",
        ),
        (
            declared_items >= policy.minimum_items,
            f"{declared_items} declared items; policy.minimum_items is {policy.minimum_items}",
        ),
    )
    for kept, broken in rules:
        if not kept:
            raise PolicyViolated(f"job {spec.name}: {broken}")
    _check_epsilon(job, policy=policy)


def _check_epsilon(job: TrainingJob, *, policy: Policy) -> None:
    # Measured at the policy's delta and composition, not at whatever the job calls its own.
    delta = exact(policy.delta)
    planned = {
        "training": job.plan.charge_training(Spending(), job=job.digest).epsilon(
            delta=delta, composition=policy.composition
        ),
        "evaluation": job.plan.charge_evaluation(Spending(), job=job.digest).epsilon(
            delta=delta, composition=policy.composition
        ),
    }
    for what, epsilon in planned.items():
        if Fraction(epsilon) > exact(policy.epsilon_per_job):
            raise PolicyViolated(
                f"job {job.spec.name}: {what} would cost epsilon {printed(epsilon)}; policy.epsilon_per_job is "
                f"{policy.epsilon_per_job:.2f}; ask for a lower privacy.target_epsilon"
            )
