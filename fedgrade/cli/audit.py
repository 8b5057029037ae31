"""``fedgrade audit``: canaries through this installation's own clip, grid, sum and noise, against what is claimed.

Reads no photo and no ledger, and charges nothing. Needs the site extra, because it runs the site's own code.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from fedgrade.cli.budget import plain_console
from fedgrade.errors import DocumentRefused
from fedgrade.privacy.accounting import printed
from fedgrade.privacy.audit import MIN_CANARIES, AuditReport
from fedgrade.trust.canonical import MAX_DOCUMENT_BYTES
from fedgrade.trust.envelope import open_sealed
from fedgrade.trust.identity import read_roster

if TYPE_CHECKING:
    from fedgrade.job import TrainingJob

NO_EVIDENCE = "no evidence against the claim"
_EPSILON, _ROUNDS = 4.0, 20
_MAX_CANARIES = 3840
_MAX_ROUNDS = 1000


@click.command(epilog="Example: fedgrade audit --epsilon 2 --rounds 20")
@click.option(
    "--mechanism-from", "source", metavar="JOB", type=click.Path(path_type=Path, exists=True),
    help="Audit the mechanisms of a sealed job: its file, or the folder of the model released from it.",
)  # fmt: skip
@click.option(
    "--roster", type=click.Path(path_type=Path, dir_okay=False), help="The roster whose coordinator sealed JOB."
)
@click.option("--epsilon", type=click.FloatRange(0.0, 100.0, min_open=True), help=f"Without JOB ({_EPSILON:g}).")
@click.option("--rounds", type=click.IntRange(1, _MAX_ROUNDS), help=f"Without JOB ({_ROUNDS}).")
@click.option("--canaries", type=click.IntRange(MIN_CANARIES, _MAX_CANARIES), default=1000, show_default=True)
def audit(source: Path | None, roster: Path | None, epsilon: float | None, rounds: int | None, canaries: int) -> None:
    """Send canaries through the site's own releases and compare what comes out with what is charged.

    Ends with status 1, naming the check, if they speak against the claim. An audit can find a fault; it cannot show
    that there is none.
    """
    try:
        from fedgrade.federation.canaries import CanaryTrial, audit_job, audit_releases  # noqa: PLC0415 - needs torch
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"`fedgrade audit` needs {error.name}; install it with: pip install 'fedgrade[site]'"
        ) from error
    if source is not None and (epsilon is not None or rounds is not None):
        raise click.UsageError("--epsilon and --rounds are for an audit without --mechanism-from, which knows both")
    if source is None:
        job = audit_job(epsilon=epsilon or _EPSILON, rounds=rounds or _ROUNDS)
    else:
        job = _read_job(source, roster)
    trials = [CanaryTrial(job=job, purpose=purpose, canaries=canaries) for purpose in ("centre", "train")]
    reports = {trial.purpose: audit_releases(trial) for trial in trials}
    console = plain_console()
    for purpose, report in reports.items():
        console.print(_described(purpose, report))
        console.print(_table(report))
        console.print()
    failed = [f"{purpose}: {check.name}" for purpose, report in reports.items() for check in report.failed]
    if failed:
        raise click.ClickException(f"audit: evidence against the claim: {', '.join(failed)}")
    console.print(f"{canaries} canaries, each in with probability 1/2: {NO_EVIDENCE}.")


def _read_job(source: Path, roster: Path | None) -> "TrainingJob":
    """The job at ``source``, signed by the roster's coordinator.

    Raises:
        DocumentRefused: there is no roster, or no job.
        SignatureRefused: the roster's coordinator did not sign it.
    """
    from fedgrade.federation.release import open_release  # noqa: PLC0415
    from fedgrade.job import TrainingJob  # noqa: PLC0415

    if roster is None:
        raise DocumentRefused(f"{source}: a job does not say whose key must sign it; give --roster")
    coordinator = read_roster(roster).coordinator
    if source.is_dir():
        return open_release(source, signed_by=coordinator).release.job
    with source.open("rb") as file:
        raw = file.read(MAX_DOCUMENT_BYTES + 1)
    return open_sealed(raw, as_=TrainingJob, signed_by=coordinator, what=f"job {source}")


def _described(purpose: str, report: AuditReport) -> str:
    claim, releases = report.claim, "release" if report.claim.rounds == 1 else "releases"
    return (
        f"Claim for {purpose}: {claim.rounds} {releases} with noise of {claim.noise_multiplier:.3f} times the "
        f"sensitivity, at a cost of epsilon {printed(claim.epsilon)} at delta {float(claim.delta):g}, per item."
    )


def _table(report: AuditReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "measured", "must be within", ""):
        table.add_column(heading, no_wrap=True)
    for check in report.checks:
        within = f"{_rounded(check.lowest)} to {_rounded(check.highest)}"
        table.add_row(check.name, _rounded(check.measured), within, "passed" if check.passed else "FAILED")
    table.add_row("one-run lower bound on epsilon, 95 %: any mechanism (Steinke et al. 2023)", f"{report.bound:.2f}")
    table.add_row("the same, Gaussian mechanisms (Mahloujifar et al. 2024)", f"{report.gaussian_bound:.2f}")
    return table


def _rounded(number: float) -> str:
    return f"{number:.3f}" if math.isfinite(number) else str(number)
