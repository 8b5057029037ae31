"""The privacy report: one self-contained page from what the ledgers prove, and nothing else.

Same ledgers and same time of writing, same bytes. The page loads nothing and runs no script; its own policy forbids it.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedgrade.errors import DocumentRefused
from fedgrade.federation.site_proof import AccountProof
from fedgrade.federation.store import write_durably
from fedgrade.federation.verification import FederationProof, JobProof, verify_federation
from fedgrade.report.accounts import (
    account_rows,
    attempt_rows,
    budget_of,
    correction_rows,
    fullest,
    nearest_to_ceiling,
    spending_of,
)
from fedgrade.report.checks import checks, plan_rows, software_rows
from fedgrade.report.figures import MAX_BARS, MAX_LINES, BudgetBar, SpendingLine, budget_bars, merged, spending_lines
from fedgrade.report.observers import (
    ObserverRow,
    SiteRow,
    account_bound,
    group_rows,
    observer_rows,
    site_rows,
    worst_epsilon,
)
from fedgrade.report.page import rendered
from fedgrade.report.quality import Quality, quality
from fedgrade.report.releases import ReleaseRow, release_rows, smallest_scale, uses_floating_point
from fedgrade.report.words import (
    area_text,
    counted,
    delta_text,
    epsilon_text,
    grouped,
    limit_text,
    plain,
    share_text,
)
from fedgrade.trust.identity import Roster
from fedgrade.trust.records import AccountKey

RosterSource = Literal["verifier", "folder"]


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """One job as the page shows it; texts, ready to print."""

    name: str
    digest: str
    mode: str
    rounds: str
    participants: str
    first: str
    last: str
    observers: tuple[ObserverRow, ...]
    sites: tuple[SiteRow, ...]
    releases: tuple[ReleaseRow, ...]
    floating_point: bool
    smallest_scale: str
    quality: Quality | None
    plan: tuple[tuple[str, str], ...]
    release_digest: str
    weights_digest: str
    published: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The account that has been charged most, which no other observer or account exceeds; texts, ready to print."""

    site: str
    epsilon: str
    delta: str
    ceiling: str
    share: str
    true_positives: str
    area: str


def privacy_report(proof: FederationProof, *, generated: datetime, roster_source: RosterSource = "folder") -> str:
    """The report on ``proof`` as one HTML document.

    Args:
        proof: what :func:`fedgrade.federation.verification.verify_federation` returned.
        generated: when the report is written; printed in UTC.
        roster_source: whether the verifier brought the roster along, or took the one that lay in the folder, which
            proves consistency but not whose keys these are.
    """
    bars, lines = budget_of(proof), spending_of(proof)
    return rendered(
        "privacy.html.j2",
        generated=generated.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        roster_source=roster_source,
        summary=_summary(fullest(proof)),
        nearest=_summary(nearest_to_ceiling(proof)),
        holder=_holder(proof),
        photos=_photos_per_item(proof),
        jobs=tuple(_job_facts(job, proof) for job in proof.jobs.values()),
        accounts=account_rows(proof),
        attempts=attempt_rows(proof),
        groups=group_rows(proof),
        checks=checks(proof),
        corrections=correction_rows(proof),
        software=software_rows(proof),
        bars_left_out=sum(len(site.accounts) for site in proof.sites.values()) - len(bars),
        lines_unnamed=max(0, len(merged(lines)) - MAX_LINES),
        budget=budget_bars(bars, description=_described_bars(bars)) if bars else None,
        spending=spending_lines(lines, description=_described_lines(lines)) if lines else None,
    )


def write_report(folder: Path, *, roster: Roster | None, now: datetime) -> Path:
    """Verify ``folder`` and write ``report/privacy.html`` into it, whole or not at all; returns its path.

    Args:
        folder: a federation's, as :func:`fedgrade.federation.verification.verify_federation` takes it.
        roster: the one that the verifier trusts, or none to take the folder's own.
        now: printed as the time of writing.

    Raises:
        LedgerBroken, SignatureRefused, DocumentRefused, ModelRefused: names the first thing that does not hold; no
            report is written, and an older one is left as it was.
    """
    proof = verify_federation(folder, roster=roster)
    page = privacy_report(proof, generated=now, roster_source="folder" if roster is None else "verifier")
    path = folder / "report" / "privacy.html"
    try:
        path.parent.mkdir(exist_ok=True)
        write_durably(path, page.encode())
    except OSError as error:
        with suppress(OSError):
            path.with_name(path.name + ".part").unlink()
        raise DocumentRefused(
            f"report {path}: cannot be written ({error.strerror}); make room for it and report again"
        ) from error
    return path


def _holder(proof: FederationProof) -> ObserverRow | None:
    """Whoever gets the model, in the job where it learns most."""
    jobs = [job for job in proof.jobs.values() if job.observers]
    if not jobs:
        return None
    worst = max(jobs, key=lambda job: worst_epsilon(job, "model_holder"))
    return next(row for row in observer_rows(worst) if row.name == "model_holder")


def _summary(account_of: tuple[AccountKey, AccountProof] | None) -> Summary | None:
    if account_of is None:
        return None
    key, account = account_of
    bound = account_bound(account.spending, account.epsilon, delta=account.dataset.delta)
    return Summary(
        site=key.partner,
        epsilon=epsilon_text(account.epsilon),
        delta=delta_text(account.dataset.delta),
        ceiling=limit_text(account.dataset.epsilon_limit),
        share=share_text(account.epsilon / float(account.dataset.epsilon_limit)),
        true_positives=share_text(bound.true_positive_rate),
        area=area_text(bound.area_under_curve),
    )


def _job_facts(job: JobProof, proof: FederationProof) -> JobFacts:
    times = sorted(
        charge.time
        for site in proof.sites.values()
        for charge in site.charges.values()
        if charge.reserve.job == job.job.digest
    )
    release = job.release
    return JobFacts(
        name=plain(job.job.spec.name),
        digest=grouped(job.job.digest),
        mode=job.job.plan.mode,
        rounds=counted(sum(closed.purpose == "train" for closed in job.rounds), "training round"),
        participants=counted(len(job.job.declared_items), "partner"),
        first=_minute(times[0]) if times else "",
        last=_minute(times[-1]) if times else "",
        observers=observer_rows(job),
        sites=site_rows(job),
        releases=release_rows(job, proof),
        floating_point=uses_floating_point(job),
        smallest_scale=f"{smallest_scale(job):,}",
        quality=quality(job),
        plan=plan_rows(job.job),
        release_digest=grouped(release.digest) if release else "",
        weights_digest=grouped(release.release.weights_digest) if release else "",
        published=plain(release.release.published) if release else "",
    )


def _minute(time: str) -> str:
    """The ledger's own time stamp, to the minute."""
    return plain(time)[:16].replace("T", " ") + " UTC"


def _photos_per_item(proof: FederationProof) -> int:
    accounts = (account for site in proof.sites.values() for account in site.accounts.values())
    return max((account.dataset.photos_per_item for account in accounts), default=1)


def _described_bars(bars: Sequence[BudgetBar]) -> str:
    return "; ".join(
        f"{bar.label}, {'training' if bar.training else 'held-out'} items: "
        f"{epsilon_text(bar.used)} of {bar.ceiling:.2f}"
        for bar in bars
    )


def _described_lines(lines: Sequence[SpendingLine]) -> str:
    told = [
        f"{line.label}: {counted(len(line.epsilons), 'charge')}, epsilon {epsilon_text(line.epsilons[-1])} after the "
        f"last, ceiling {line.ceilings[-1]:.2f}"
        for line in lines[:MAX_BARS]
    ]
    return "; ".join(told) + ("; the rest in the tables" if len(lines) > MAX_BARS else "")
