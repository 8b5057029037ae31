"""``fedgrade plan``: what a job would cost, leave, be refused for and measure, before anything runs.

Opens no connection, reads no photo, charges nothing; ledgers are verified as anyone may, and not locked.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from fedgrade.cli.budget import bar, left, plain_console, shown_name
from fedgrade.errors import DocumentRefused, PlanRefused
from fedgrade.evaluation import ConfusionCounts
from fedgrade.federation.forecast import (
    AccountForecast,
    JobForecast,
    SiteForecast,
    forecast,
    held_out_items,
    latest_counts,
    metrics_forecast,
    plausible_counts,
    strongest_attacks,
    training_path,
)
from fedgrade.federation.store import write_durably
from fedgrade.job import JobSpec, TrainingJob, plan_job
from fedgrade.privacy.accounting import printed
from fedgrade.trust.identity import site_id
from fedgrade.trust.records import PoissonGaussian, Purpose
from server.configure import compose_job
from server.surroundings import Surroundings, read_surroundings

NONCE = "forecast"  # a job that is only planned needs no digest of its own
ASSUMED_SITES, ASSUMED_ITEMS = 5, 400
_OBSERVERS = {
    "model_holder": "whoever gets the model",
    "other_partner": "another partner",
    "coordinator": "the coordinator",
    "full_collusion": "everyone else together",
}


@click.command(epilog="Example: fedgrade plan experiment=pilot --federation runs/federation --plot plan.svg")
@click.option(
    "--federation", "folder", type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of a federation: its sites, their policies and ledgers.",
)  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write epsilon over rounds as SVG.")
@click.option("--sites", type=click.IntRange(2, 1000), help=f"Without --federation: how many sites ({ASSUMED_SITES}).")
@click.option("--items", type=click.IntRange(1), help=f"Without --federation: what each declares ({ASSUMED_ITEMS}).")
@click.argument("overrides", nargs=-1)
def plan(
    folder: Path | None, plot: Path | None, sites: int | None, items: int | None, overrides: tuple[str, ...]
) -> None:
    """Say what a job would cost before it runs: nothing is started, sent or charged.

    OVERRIDES choose and change the job, as for `fedgrade run`. Ends with status 1 if too few sites would take part.
    """
    if folder is not None and (sites is not None or items is not None):
        raise click.UsageError("--sites and --items are for a plan without --federation, which knows both")
    spec = compose_job(list(overrides))
    around = _assumed(spec, sites=sites, items=items) if folder is None else read_surroundings(folder)
    job = plan_job(spec, declared_items=around.declared_items, nonce=NONCE)
    forecasted = forecast(job, standings=around.standings)
    if plot is not None:
        write_plot(plot, forecasted)
    _show(plain_console(), forecasted, around)
    if not forecasted.runs:
        raise PlanRefused(
            f"job {spec.name}: {len(forecasted.willing)} of {len(forecasted.sites)} sites would take part; "
            f"aggregation.minimum_sites is {spec.aggregation.minimum_sites}"
        )


def write_plot(path: Path, forecasted: JobForecast) -> None:
    """Epsilon of each training account over the job's releases, as an SVG file.

    Raises:
        PlanRefused: no account can express the job.
        DocumentRefused: the file cannot be written.
    """
    from fedgrade.report.plan_figure import PlannedLine, plan_plot  # noqa: PLC0415 - matplotlib takes its time

    lines = [
        PlannedLine(label=label, path=path_of, ceiling=_ceiling(account))
        for label, account, path_of in _paths(forecasted)
        if math.isfinite(account.after)
    ]
    if not lines:
        raise PlanRefused("no account admits this job, so there is no epsilon to plot")
    job = forecasted.job
    described = f"Job {job.spec.name}: epsilon of {len(lines)} training accounts over {job.plan.rounds} rounds."
    drawing = plan_plot(lines, description=described)
    try:
        write_durably(path, drawing)
    except OSError as error:
        raise DocumentRefused(f"{path}: cannot be written ({error.strerror})") from error


def _paths(forecasted: JobForecast) -> Iterator[tuple[str, AccountForecast, tuple[tuple[int, float], ...]]]:
    """Each training account's name and path; those that start and end alike share one, because it may take seconds."""
    known: dict[object, tuple[tuple[int, float], ...]] = {}
    for site in forecasted.sites:
        for account in site.training:
            key = (account.before, account.after, account.delta, account.composition)
            if key not in known and math.isfinite(account.after):
                known[key] = training_path(account, forecasted.job)
            yield _account_name(site, account), account, known.get(key, ())


def _account_name(site: SiteForecast, account: AccountForecast) -> str:
    """The site's name, and the cohort's where it has more than one."""
    return site.site if len(site.training) == 1 else f"{site.site} {shown_name(account.account.cohort)}"


def _assumed(spec: JobSpec, *, sites: int | None, items: int | None) -> Surroundings:
    count, declared = sites or ASSUMED_SITES, items or max(ASSUMED_ITEMS, spec.data.minimum_items)
    names = [site_id(f"site-{number}") for number in range(1, count + 1)]
    return Surroundings(
        declared_items=dict.fromkeys(names, declared),
        standings={},
        proof=None,
        described=f"{count} assumed sites of {declared} training items each; no policy and no ledger is known",
    )


def _show(console: Console, forecasted: JobForecast, around: Surroundings) -> None:
    job = forecasted.job
    console.print(
        f"Job {job.spec.name}: privacy mode {job.plan.mode}, {job.plan.rounds} rounds, {len(job.participants)} sites. "
        f"Planned for {around.described}.\nNothing was started, sent or charged.\n"
    )
    for table in (_noise_table(job), _sites_table(forecasted, bars=console.is_terminal), _observers_table(forecasted)):
        console.print(table)
        console.print()
    _show_metrics(console, forecasted, around)
    _show_refusals(console, forecasted, around)


def _show_refusals(console: Console, forecasted: JobForecast, around: Surroundings) -> None:
    refusing: dict[str, list[str]] = {}
    for site in forecasted.sites:
        for refusal in site.refusals:
            refusing.setdefault(refusal, []).append(site.site)
    for refusal, sites in refusing.items():
        console.print(f"Refused by {', '.join(sites)}: {refusal}", style="bold red")
    for site in forecasted.sites:
        for exhausted in () if site.refusals else site.exhausted:
            console.print(f"Stays out, the site's other cohorts go on: {exhausted}", style="bold")
    _show_reservations(console, forecasted)
    if not around.standings:
        return
    silent = [site.site for site in forecasted.sites if around.standings[site.site].policy is None]
    if silent:
        console.print(f"No policy file here, so refusals by policy are not foreseen: {', '.join(silent)}.")
    if len(forecasted.willing) == len(forecasted.sites):
        console.print("No rule and no budget known here stands in the way.")


def _show_reservations(console: Console, forecasted: JobForecast) -> None:
    for site in forecasted.sites:
        for reservation in () if site.refusals else site.reservations:
            console.print(f"{site.site} {reservation}", style="bold")


def _noise_table(job: TrainingJob) -> Table:
    table = _table("Noise of each site", "release", "times", "what is added", "noise multiplier")
    for purpose, (name, times) in _releases(job).items():
        mechanism = job.plan.mechanism(purpose)
        if isinstance(mechanism, PoissonGaussian):
            added = f"Gaussian, {mechanism.steps} steps on samples of {float(mechanism.sampling_rate):g}"
            multiplier = mechanism.noise_multiplier
        else:
            added = f"discrete Gaussian, scale {mechanism.scale:,} at sensitivity {mechanism.sensitivity:,}"
            multiplier = Fraction(mechanism.scale, mechanism.sensitivity)
        table.add_row(name, f"{times:,}", added, f"{math.floor(multiplier * 1000) / 1000:,.3f}")
    return table


def _releases(job: TrainingJob) -> dict[Purpose, tuple[str, int]]:
    return {
        "centre": ("feature centre", 1),
        "train": ("training round", job.plan.rounds),
        "evaluate": ("evaluation", 1),
    }


def _sites_table(forecasted: JobForecast, *, bars: bool) -> Table:
    headings = ["site", "items", "before", "this job", "after", "ceiling", "left", "delta"]
    table = _table("Epsilon of one item, if every round runs once", *headings, *(["lifetime budget"] if bars else []))
    for site in forecasted.sites:
        for name, account in _sides(site):
            ceiling = account.ceiling
            cells = [
                _account_name(site, account),
                name,
                *(printed(epsilon) for epsilon in (account.before, account.alone, account.after)),
                "unknown" if ceiling is None else f"{float(ceiling):.2f}",
                "unknown" if ceiling is None else left(account.after, ceiling=ceiling),
                f"{float(account.delta):g}",
            ]
            shown = "" if ceiling is None else bar(account.before, account.after, ceiling=float(ceiling))
            table.add_row(*cells, *([shown] if bars else []))
    return table


def _sides(site: SiteForecast) -> Iterator[tuple[str, AccountForecast]]:
    for training, held_out in zip(site.training, site.held_out, strict=True):
        yield "training", training
        yield "held-out", held_out


def _observers_table(forecasted: JobForecast) -> Table:
    table = _table(
        "What this job lets an observer learn about one training item, at the site where it is most",
        "observer", "epsilon", "delta", "true positives at 1 % false", "area under the curve",
    )  # fmt: skip
    for name, (epsilon, delta, attack) in strongest_attacks(forecasted).items():
        table.add_row(
            _OBSERVERS[name],
            printed(epsilon),
            f"{float(delta):g}",
            f"at most {math.ceil(attack.true_positive_rate * 1000) / 10:.1f} %",
            f"at most {math.ceil(attack.area_under_curve * 100) / 100:.2f}",
        )
    return table


def _show_metrics(console: Console, forecasted: JobForecast, around: Surroundings) -> None:
    job = forecasted.job
    sites = len(forecasted.willing) or len(forecasted.sites)
    described, counts = _counts(job, around)
    expected = metrics_forecast(counts, job.plan, sites=sites, scale=job.spec.grading, rng=np.random.default_rng(0))
    table = _table(
        f"What the noise of {sites} sites does to the metrics", "metric", "without noise", "mean with", "deviation"
    )
    for title, name in (
        ("quadratic weighted kappa", "quadratic_weighted_kappa"),
        ("accuracy", "accuracy"),
        ("critical-miss rate", "critical_miss_rate"),
    ):
        values = (getattr(part, name) for part in (expected.exact, expected.mean, expected.deviation))
        table.add_row(title, *(f"{value:.3f}" for value in values))
    console.print(table)
    console.print(
        f"Simulated on {described}: {expected.exact.items:,.0f} items; the noise of one count has deviation "
        f"{expected.cell_deviation:.1f}.\n"
    )


def _counts(job: TrainingJob, around: Surroundings) -> tuple[str, ConfusionCounts]:
    """The table that metrics are simulated on, and where it comes from."""
    published = latest_counts(around.proof, scale=job.spec.grading) if around.proof else None
    if published is not None:
        name, counts = published
        return f"the counts that job {name} published", counts
    share = job.spec.data.test_fraction
    made_up = plausible_counts(job.spec.grading, items=held_out_items(job))
    return (
        f"a made-up table (data.test_fraction {share:g} of the items, all grades equally frequent, each step from the "
        "truth four times rarer)"
    ), made_up


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _ceiling(account: AccountForecast) -> float | None:
    return None if account.ceiling is None else float(account.ceiling)
