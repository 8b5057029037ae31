"""``fedgrade runs`` and ``watch``: what a coordinator's folder has run, and the run that is on; asks no SuperLink."""

import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from fedgrade.cli.budget import plain_console, shown_name
from fedgrade.errors import FedgradeError
from fedgrade.federation.rounds import stages_of
from fedgrade.privacy.accounting import printed
from server.attached import is_served
from server.coordinator_folder import CoordinatorFolder
from server.enrolment import read_book
from server.nodes_file import version
from server.progress_file import read_progress
from server.run_now import Awaited, read_awaited, read_refusals
from server.runs import DIGITS, current_job, known_runs, state_of_current
from server.watch_page import RunView, end_line, moment, page, plain, stage_line

if TYPE_CHECKING:
    from fedgrade.federation.progress import Progress
    from fedgrade.job import TrainingJob

EXISTING = click.Path(path_type=Path, file_okay=False, exists=True)
_REFRESH_SECONDS: Final = 1.0
_LINE_EVERY_SECONDS: Final = 5.0
_TAKEN_UP_SECONDS: Final = 120.0  # after which a run whose process is gone is no longer waited for
_MOST_WHY: Final = 600  # characters: reasons name sites, and say at their end what to do


class RunEnded(FedgradeError):
    """The run that was watched came to no release."""


def _shortened(why: str) -> str:
    return why if len(why) <= _MOST_WHY else f"{why[: _MOST_WHY - 1]}…"


@click.command(epilog="Example: fedgrade runs federation")
@click.argument("folder", type=EXISTING)
def runs(folder: Path) -> None:
    """List every job that the coordinator's FOLDER knows, the newest first: how far it came, and how it ended.

    Works whether or not a SuperLink serves the folder. What is listed is the coordinator's own note of it; what is
    proved stands in `fedgrade verify` and `fedgrade releases`.
    """
    table = Table("begun", "job", "", "epsilon", "stages", "outcome", box=None, pad_edge=False)
    known = known_runs(CoordinatorFolder(root=folder))
    for run in known:
        outcome = run.state + (f": {_shortened(plain(run.why))}" if run.why else "")
        stages = f"{run.done} of {run.stages}" if run.stages else ""
        epsilon = printed(run.epsilon) if run.epsilon else ""
        table.add_row(moment(run.began), shown_name(run.name), run.job[:DIGITS], epsilon, stages, outcome)
    if known:
        plain_console().print(table)
    else:
        click.echo(f"{folder}: no job was run here yet")


@click.command(epilog="Example: fedgrade watch federation")
@click.argument("folder", type=EXISTING)
@click.option("--once", is_flag=True, help="Show it once and end; also a run that is over.")
def watch(folder: Path, *, once: bool) -> None:
    """Watch the run that is on in FOLDER until it ends: which sites answered which stage, and who is missing now.

    Says nothing to the run and may be left at any time. Ends with status 1 if no release came of the run. Where the
    output is no terminal, a line is printed every few seconds, and for each refusal.
    """
    watched = _Watched(CoordinatorFolder(root=folder))
    view = watched.look()
    if view is None:
        click.echo(f"{folder}: no job was run here yet")
        return
    console = Console(highlight=False, markup=False)
    if once:
        console.print(_page(view, console))
        return
    if watched.over(view):
        console.print(_page(view, console))
    else:
        view = _followed(watched, view, console)
    if view.run.state != "released":
        raise RunEnded(end_line(view.run))


def _followed(watched: "_Watched", view: RunView, console: Console) -> RunView:
    try:
        return _live(watched, view, console) if console.is_terminal else _lines(watched, view)
    except KeyboardInterrupt:
        click.echo("The run goes on without you.")
        raise


class _Watched:
    """The run of the job that lies in a folder, read anew where its files have changed."""

    def __init__(self, folder: CoordinatorFolder) -> None:
        self._folder = folder
        self._job: TrainingJob | None = current_job(folder)
        self._seen: object = None
        self._progress: tuple[Progress, ...] = ()
        self._gone_since = math.inf

    def look(self) -> RunView | None:
        """The run as it stands; None where the folder has none."""
        job, folder = self._job, self._folder
        if job is None:
            return None
        # First how it stands: what is read after that is never older.
        run = state_of_current(folder, job)
        if (seen := version(folder.progress)) != self._seen:
            self._progress, self._seen = read_progress(folder.progress), seen
        return RunView(
            run=run,
            participants=job.participants,
            stages=stages_of(job),
            progress=self._progress,
            awaited=self._awaited(),
            refusals=read_refusals(folder.progress.parent),
            revoked=frozenset(read_book(folder).membership.former) if folder.book.exists() else frozenset(),
        )

    def _awaited(self) -> Awaited:
        """Whom the open question waits for; one that is older than the last finished stage is open no more."""
        awaited = read_awaited(self._folder.progress.parent)
        return awaited if not self._progress or awaited.asked > self._progress[-1].finished else Awaited()

    def over(self, view: RunView) -> bool:
        """Whether the run of ``view`` is over: one whose process is gone may be taken up again by who serves it."""
        if view.run.state != "interrupted" or not is_served(self._folder.root):
            self._gone_since = math.inf
            return view.run.state != "on"
        self._gone_since = min(self._gone_since, time.monotonic())
        return time.monotonic() - self._gone_since > _TAKEN_UP_SECONDS

    def again(self) -> RunView:
        """The run as it stands, of a folder that has one."""
        view = self.look()
        assert view is not None  # noqa: S101 - it was there before
        return view


def _live(watched: _Watched, view: RunView, console: Console) -> RunView:
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(_page(view, console), refresh=True)
            if watched.over(view):
                return view
            time.sleep(_REFRESH_SECONDS)
            view = watched.again()


def _lines(watched: _Watched, view: RunView) -> RunView:
    """The same for a log: not every stage, but each in which somebody else is missing than before."""
    said, shown, absent, last = view.refusals.sites, 0, None, float("-inf")
    while True:
        for site, refused in view.refusals.sites.items():
            if said.get(site) != refused:
                click.echo(f"{site} {plain(refused.words)}")
        said = view.refusals.sites
        for progress in view.progress:
            due = progress is view.progress[-1] and time.monotonic() - last >= _LINE_EVERY_SECONDS
            if progress.stage > shown and (due or progress.absent != absent or progress.stage == progress.stages):
                click.echo(stage_line(view, progress))
                absent, last, shown = progress.absent, time.monotonic(), progress.stage
        if watched.over(view):
            click.echo(end_line(view.run))
            return view
        time.sleep(_REFRESH_SECONDS)
        view = watched.again()


def _page(view: RunView, console: Console) -> RenderableType:
    return page(view, width=console.width, height=console.height, now=datetime.now(UTC))
