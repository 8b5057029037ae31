"""What a coordinator's operator sees while a job runs: a moving bar on a terminal, plain lines in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedgrade.federation.progress import Progress as StageProgress

LINE_EVERY_SECONDS = 5.0


class ProgressBoard:
    """Takes notes and finished stages, in any thread, and shows them."""

    def __init__(self, console: Console, *, stages: int, bar: Progress) -> None:
        self._console = console
        self._stages = stages
        self._bar = bar
        self._task = bar.add_task("starting", total=stages)
        self._began = time.monotonic()
        self._first_stage = 0.0
        self._last_line = 0.0

    def note(self, line: str) -> None:
        """Something happened that is no stage."""
        self._console.print(f"{self._elapsed()}  {line}")
        self._bar.update(self._task, description=line)

    def features(self, percent: int) -> None:
        """Sites have features of this share of their photos; the first time, this is the longest part."""
        line = f"features of photos: {percent} %"
        self._bar.update(self._task, description=line)
        now = time.monotonic()
        if not self._console.is_terminal and percent and now - self._last_line > LINE_EVERY_SECONDS:
            self._last_line = now
            self._console.print(f"{self._elapsed()}  {line}")

    def watch(self, progress: StageProgress) -> None:
        """A stage is finished."""
        sites = f"{progress.answered} of {progress.participants} sites"
        self._bar.update(self._task, completed=progress.stage, description=f"{progress.purpose}, {sites}")
        now = time.monotonic()
        self._first_stage = self._first_stage or now
        last = progress.stage == progress.stages
        if self._console.is_terminal or not (last or now - self._last_line > LINE_EVERY_SECONDS):
            return
        self._last_line = now
        line = f"{self._elapsed()}  stage {progress.stage} of {progress.stages}: {progress.purpose}, {sites}"
        known = progress.stage > 1 and not last
        self._console.print(f"{line}, about {self._left(progress, now)} left" if known else line)

    def _elapsed(self) -> str:
        return _minutes(time.monotonic() - self._began)

    def _left(self, progress: StageProgress, now: float) -> str:
        # From the first finished stage on: what came before it (start-up, features) is not repeated.
        done = progress.stage - 1  # the first stage is where the clock starts
        return _minutes((now - self._first_stage) / done * (progress.stages - progress.stage))


@contextmanager
def progress_board(console: Console, *, stages: int) -> Iterator[ProgressBoard]:
    """A board for a job of ``stages`` stages, on the screen until the block ends."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield ProgressBoard(console, stages=stages, bar=bar)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
