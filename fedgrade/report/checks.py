"""What was checked before a word of the report was written, and the sealed plan that everything was checked against."""

from dataclasses import dataclass
from fractions import Fraction

from fedgrade.federation.sum_task import sums
from fedgrade.federation.verification import FederationProof
from fedgrade.job import TrainingJob
from fedgrade.privacy.plan import DistributedSpec
from fedgrade.report.words import delta_text, grouped, limit_text, plain
from fedgrade.trust.records import DiscreteGaussian


@dataclass(frozen=True, kw_only=True)
class KeyRow:
    """One identity on the roster, its key's fingerprint, and its ledger's head if the ledger was there."""

    name: str
    fingerprint: str
    entries: str
    head: str


@dataclass(frozen=True, kw_only=True)
class SoftwareRow:
    """What ran at some sites, by their own word, and at which."""

    version: str
    source: str
    libraries: str
    sites: str


@dataclass(frozen=True, kw_only=True)
class Checks:
    """How much was checked; numbers of things that each had to hold."""

    entries: int
    charges: int
    receipts: int
    witnessed: int
    secure_sums: int
    sealed_jobs: int
    releases: int
    keys: tuple[KeyRow, ...]
    absent: tuple[str, ...]
    unclosed_jobs: tuple[str, ...]

    @property
    def signatures(self) -> int:
        """Each entry, receipt, sealed job and release carries one."""
        return self.entries + self.receipts + self.sealed_jobs + self.releases


def software_rows(proof: FederationProof) -> tuple[SoftwareRow, ...]:
    """Everything that ever ran at a site, each once."""
    ran: dict[tuple[str, str, str], set[str]] = {}
    for site in proof.sites.values():
        for software in site.software.values():
            named = sorted(software.libraries.items())
            libraries = ", ".join(f"{plain(name)} {plain(version)}" for name, version in named)
            ran.setdefault((software.fedgrade, software.source, libraries), set()).add(site.site)
    return tuple(
        SoftwareRow(version=plain(version), source=grouped(source), libraries=libraries, sites=", ".join(sorted(sites)))
        for (version, source, libraries), sites in sorted(ran.items())
    )


def checks(proof: FederationProof) -> Checks:
    """What :func:`fedgrade.federation.verification.verify_federation` went through for ``proof``."""
    sites = proof.sites.values()
    participants = {site for job in proof.jobs.values() for site in job.job.declared_items}
    admitted = {job for site in sites for job in site.jobs}
    return Checks(
        entries=proof.entries,
        charges=sum(len(site.charges) for site in sites),
        receipts=sum(len(closed.receipts) for job in proof.jobs.values() for closed in job.rounds),
        witnessed=proof.witnessed,
        secure_sums=sum(len(job.rounds) for job in proof.jobs.values() if sums(job.job)),
        sealed_jobs=sum(len(site.jobs) for site in sites),
        releases=sum(job.release is not None for job in proof.jobs.values()),
        keys=_key_rows(proof),
        absent=tuple(sorted(participants - set(proof.sites))),
        unclosed_jobs=tuple(sorted(admitted - set(proof.jobs))),
    )


def plan_rows(job: TrainingJob) -> tuple[tuple[str, str], ...]:
    """The sealed privacy plan, field by field."""
    plan, spec = job.plan, job.spec
    rows = [
        ("mode", plan.mode),
        ("target_epsilon", limit_text(plan.target_epsilon)),
        ("delta", delta_text(plan.delta)),
        ("rounds", f"{plan.rounds:,}"),
        ("max_grad_norm", f"{plan.max_grad_norm:g}"),
        ("evaluation_epsilon", limit_text(Fraction(repr(spec.privacy.evaluation_epsilon)))),
        ("centre_share", f"{spec.privacy.centre_share:g}"),
        ("participants", f"{len(job.declared_items):,}"),
        ("minimum_sites", f"{spec.aggregation.minimum_sites:,}"),
        ("aggregation", "secure sum" if sums(job) else "mean of uploads"),
        ("minimum_items", f"{spec.data.minimum_items:,}"),
    ]
    if isinstance(spec.privacy, DistributedSpec):
        rows.append(("floor_epsilon", limit_text(Fraction(repr(spec.privacy.floor_epsilon)))))
    for name in ("centre", "train", "evaluate"):
        mechanism = plan.mechanism(name)
        if isinstance(mechanism, DiscreteGaussian):
            text = f"discrete Gaussian, sensitivity {mechanism.sensitivity:,}, scale {mechanism.scale:,} grid steps"
        else:
            text = (
                f"Poisson Gaussian, sampling rate {mechanism.sampling_rate}, noise multiplier "
                f"{mechanism.noise_multiplier}, {mechanism.steps:,} steps a round"
            )
        rows.append((name, text))
    return (*rows, *_model_rows(job))


def _model_rows(job: TrainingJob) -> tuple[tuple[str, str], ...]:
    model = job.spec.model
    return (
        ("asset type", plain(job.spec.data.asset_type)),
        ("backbone", model.backbone),
        ("backbone weights", grouped(model.weights_digest)),
        ("features", f"{model.feature_dimensions:,}: {', '.join(model.pooling)}"),
        ("grades", ", ".join(plain(label) for label in job.spec.grading.labels)),
        ("nonce", plain(job.nonce)),
    )


def _key_rows(proof: FederationProof) -> tuple[KeyRow, ...]:
    rows = [
        KeyRow(
            name="coordinator",
            fingerprint=grouped(proof.roster.coordinator.key_id),
            entries=f"{proof.coordinator_entries:,}",
            head=grouped(proof.coordinator_head),
        )
    ]
    for name, key in sorted(proof.roster.sites.items()):
        site = proof.sites.get(name)
        rows.append(
            KeyRow(
                name=name,
                fingerprint=grouped(key.key_id),
                entries=f"{site.entries:,}" if site else "",
                head=grouped(site.head) if site else "",
            )
        )
    return tuple(rows)
