"""``fedgrade site jobs``, ``approve`` and ``decline``: a person has a look at a job before any photo pays for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from clients.settings import SiteFolder, read_own_file, read_site
from fedgrade.errors import JobRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedgrade.federation.approvals import Approvals, AskedJob, Decision

SITE_FILE: Final = click.Path(path_type=Path, dir_okay=False)
_DIGITS: Final = 16  # of a digest, where a person compares it


@click.command(epilog="Example: fedgrade site jobs site.yaml")
@click.argument("site_file", type=SITE_FILE)
def jobs(site_file: Path) -> None:
    """List the jobs that were shown to this site while policy.approval was on, those that wait first."""
    from fedgrade.cli.budget import shown_name  # noqa: PLC0415 - see below

    _, asked = _asked(read_site(site_file))
    for one in asked:
        spec = one.job.spec
        click.echo(f"{one.job.digest[:_DIGITS]}  {one.decision:<8}  {spec.name}: {shown_name(spec.data.asset_type)}")
    if not asked:
        click.echo("no job was shown to this site while policy.approval was on")


@click.command(epilog="Example: fedgrade site approve site.yaml 3f9a12c0d4e5b677")
@click.argument("site_file", type=SITE_FILE)
@click.argument("job")
@click.option("--yes", is_flag=True, help="Do not ask.")
def approve(site_file: Path, job: str, *, yes: bool) -> None:
    """Show what JOB is for and what it would cost this site's items, and let it run if you agree.

    JOB is its digest, or the first digits of it, as `fedgrade site jobs` lists them.
    """
    folder = read_site(site_file)
    approvals, asked = _asked(folder)
    chosen = _chosen(asked, job)
    for line in _described(folder, chosen):
        click.echo(line)
    if not yes:
        click.confirm("Approve it?", abort=True)
    _decide(approvals, chosen, "approved")


@click.command(epilog="Example: fedgrade site decline site.yaml 3f9a12c0d4e5b677")
@click.argument("site_file", type=SITE_FILE)
@click.argument("job")
def decline(site_file: Path, job: str) -> None:
    """Keep this site out of JOB, from the next thing that is asked on also where it takes part already.

    That needs `approval: true` in the policy; without it, a job under way ends with lower ceilings, or a pause.
    """
    approvals, asked = _asked(read_site(site_file))
    _decide(approvals, _chosen(asked, job), "declined")


def _decide(approvals: "Approvals", chosen: "AskedJob", decision: "Decision") -> None:
    approvals.decide(chosen.job, decision)
    click.echo(f"{chosen.job.digest[:_DIGITS]}  {decision}  {chosen.job.spec.name}")


def _asked(folder: SiteFolder) -> "tuple[Approvals, tuple[AskedJob, ...]]":
    # Imported here: plans and their accountants take a second, and `fedgrade site status` should not wait for them.
    from fedgrade.federation.approvals import Approvals  # noqa: PLC0415
    from fedgrade.trust.identity import read_roster  # noqa: PLC0415

    settings = folder.settings
    approvals = Approvals(folder.approvals)
    return approvals, approvals.asked(coordinator=read_roster(folder.path(settings.roster)).coordinator)


def _chosen(asked: "Sequence[AskedJob]", job: str) -> "AskedJob":
    found = [one for one in asked if job and one.job.digest.startswith(job)]
    if len(found) != 1:
        raise JobRefused(
            f"job {job[:80]!r}: {len(found)} of the {len(asked)} jobs that were shown to this site begin so; give more "
            "of the digest that `fedgrade site jobs` lists"
        )
    return found[0]


def _described(folder: SiteFolder, chosen: "AskedJob") -> list[str]:
    """Purpose and cost of a job, by the partner's own policy and ledger."""
    from fedgrade.cli.budget import bar, shown_name  # noqa: PLC0415 - see above
    from fedgrade.federation.forecast import Standing, forecast  # noqa: PLC0415
    from fedgrade.federation.policy import Policy  # noqa: PLC0415
    from fedgrade.federation.site_proof import prove_site  # noqa: PLC0415
    from fedgrade.privacy.accounting import printed  # noqa: PLC0415
    from fedgrade.trust.canonical import decode_yaml  # noqa: PLC0415
    from fedgrade.trust.identity import read_roster  # noqa: PLC0415

    settings, job = folder.settings, chosen.job
    ledger, policy = folder.path(settings.ledger), folder.path(settings.policy)
    roster = read_roster(folder.path(settings.roster))
    standing = Standing(
        policy=decode_yaml(Policy, read_own_file(policy, what="policy"), what=f"policy {policy}"),
        proof=prove_site(ledger, site=settings.site, roster=roster) if ledger.exists() else None,
        lineage=settings.lineage,
        cohorts={name: cohort.declared_items for name, cohort in settings.cohorts.items()},
        coordinator=roster.coordinator,
    )
    mine = next(one for one in forecast(job, standings={settings.site: standing}).sites if one.site == settings.site)
    spec, seen = job.spec, mine.observers
    lines = [
        f"Job {shown_name(spec.name)}, {job.digest}",
        f"  purpose       grade {shown_name(spec.data.asset_type)} as "
        + ", ".join(shown_name(label) for label in spec.grading.labels),
        f"  with          {len(job.participants)} sites: {', '.join(job.participants[:8])}"
        + (" …" if len(job.participants) > 8 else ""),  # noqa: PLR2004 - as many as one line holds
        (
            f"  trains        {spec.model.trainable} on {spec.model.backbone}, privacy mode {job.plan.mode}, "
            f"{job.plan.rounds} rounds, {spec.aggregation.method.replace('_', ' ')}"
        ),
        (
            f"  an item's epsilon at delta {float(job.plan.delta):g}: "
            + ", ".join(
                (
                    f"{printed(seen.model_holder)} whoever gets the model",
                    f"{printed(seen.other_partner)} another partner",
                    f"{printed(seen.coordinator)} the coordinator",
                    f"{printed(seen.full_collusion)} everyone else together",
                )
            )
        ),
    ]
    for side, accounts in (("training", mine.training), ("held-out", mine.held_out)):
        for account in accounts:
            ceiling = float(account.ceiling or 0)
            lines.append(
                f"  {account.account.cohort} {side:<9} {bar(account.before, account.after, ceiling=ceiling)} "
                f"{printed(account.before)} spent, {printed(account.after)} after it, ceiling {ceiling:.2f}"
            )
    return lines + [f"  This site would refuse it all the same: {refusal}" for refusal in mine.refusals]
