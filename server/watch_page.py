"""A run as its coordinator watches it: sites by stages, a character a cell, and in words who is missing and why.

Reads well without colours and in 80 columns: where a job has more stages than there are columns, a cell stands for
several, and shows the worst of them; where there are more sites than lines, those that always answered share one.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby, pairwise
from typing import Final, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from fedgrade.cli.budget import shown_name
from fedgrade.federation.progress import Progress
from fedgrade.federation.rounds import Stage
from fedgrade.privacy.accounting import printed
from fedgrade.trust.identity import SiteId
from server.run_now import Awaited, Refusals
from server.runs import DIGITS, KnownRun

Cell = Literal["refused", "silent", "resting", "out", "awaited", "answered", "later"]
# Worst first: what a cell shows that stands for several stages.
_LOOKS: Final[Mapping[Cell, tuple[str, str]]] = {
    "refused": ("x", "bold red"),
    "silent": ("o", "bold yellow"),
    "resting": ("z", "yellow"),
    "out": ("-", "red"),
    "awaited": ("?", "bold cyan"),
    "answered": ("■", "green"),
    "later": ("·", "bright_black"),
}
_WORDS: Final[Mapping[Cell, str]] = {
    "answered": "answered", "awaited": "asked now", "silent": "silent", "resting": "resting", "refused": "refused",
    "out": "out", "later": "not yet",
}  # fmt: skip
_STATES: Final = {"released": "bold green", "on": "bold cyan", "failed": "bold red", "interrupted": "bold red"}
_MOST_NAME, _LEAST_NAME = 24, 12  # columns
_TICK: Final = 10  # columns
_MOST_MISSING: Final = 8  # lines
_MOST_LINES: Final = 2  # of what is said of one site
_GRID_LINES: Final = 4  # of the grid, beside the sites': an empty one before it, stage numbers, two notes
_LEAST_LINES: Final = 3  # for sites, however small the terminal
_RECENT: Final = 10  # stages, of which what is left is foretold
# A stage that takes so many times as long as the ones before it, and so long, waits for somebody.
_STALLED: Final = 3.0
_STALLED_SECONDS: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run at one moment.

    Attributes:
        run: how it stands.
        participants: who takes part.
        stages: what it consists of.
        progress: the stages that are finished, as far as they were written down.
        awaited: whom the question that is open waits for.
        refusals: what sites refused with.
        revoked: who was taken off the roster.
    """

    run: KnownRun
    participants: tuple[SiteId, ...]
    stages: tuple[Stage, ...]
    progress: tuple[Progress, ...]
    awaited: Awaited
    refusals: Refusals
    revoked: frozenset[SiteId]

    @property
    def missing(self) -> dict[SiteId, Progress]:
        """Who is missing from the last stage, and the first of the stages that it has been missing from since."""
        since = dict[SiteId, Progress]()
        gone = set(self.progress[-1].absent) if self.progress else set()
        for progress in reversed(self.progress):
            gone &= progress.absent.keys()
            since.update(dict.fromkeys(gone, progress))
        return {site: since[site] for site in sorted(since)}

    def cells(self, site: SiteId) -> tuple[Cell, ...]:
        """One a stage."""
        finished: dict[int, Cell] = {
            progress.stage: progress.absent.get(site, "answered") for progress in self.progress
        }
        asked: Cell = "awaited" if site in self.awaited.sites else "later"
        going = self.run.done + 1 if self.run.state == "on" else 0
        # A stage of which nothing was written down, because its process was killed, did bring a result.
        unknown: list[Cell] = ["answered" if number <= self.run.done else "later" for number in self._numbers]
        return tuple(
            finished.get(number, asked if number == going else unknown[number - 1]) for number in self._numbers
        )

    @property
    def _numbers(self) -> range:
        return range(1, len(self.stages) + 1)


def page(view: RunView, *, width: int, height: int, now: datetime) -> RenderableType:
    """``view`` for a terminal of ``width`` columns and ``height`` lines."""
    head, tail = list(_head(view, now=now)), [_legend(), Text()]
    if view.run.state == "on" and view.awaited.sites:
        tail.append(_waiting(view, now=now))
    for line in _missing(view):
        line.truncate(_MOST_LINES * width, overflow="ellipsis")
        tail.append(line)
    taken = sum(max(1, math.ceil(line.cell_len / width)) for line in (*head, *tail)) + _GRID_LINES
    return Group(*head, Text(), *_grid(view, width=width, lines=max(_LEAST_LINES, height - taken)), *tail)


def stage_line(view: RunView, progress: Progress) -> str:
    """A finished stage, for a log."""
    line = (
        f"stage {progress.stage} of {progress.stages}: {_stage_name(view, progress.stage)}, "
        f"{progress.answered} of {progress.participants} sites"
    )
    absent = [f"{site} {_WORDS[how]}" for site, how in sorted(progress.absent.items())]
    return f"{line}; {', '.join(absent)}" if absent else line


def end_line(run: KnownRun) -> str:
    """How a run stands, in one line."""
    return f"job {shown_name(run.name)} {run.job[:DIGITS]}: {run.state}" + (f": {plain(run.why)}" if run.why else "")


def moment(time: str) -> str:
    """The UTC ``time`` of a record by this machine's clock, to the minute; empty stays empty."""
    return f"{_read(time).astimezone():%Y-%m-%d %H:%M}" if time else ""


def seconds_left(view: RunView, *, now: datetime) -> float | None:
    """How long the run will take if stages go on as the last ones did; None before two are, or where one stalls."""
    ends = [_read(progress.finished) for progress in view.progress[-_RECENT - 1 :]]
    if len(ends) < 2 or view.run.state != "on":  # noqa: PLR2004 - two ends make one length
        return None
    length = statistics.median((after - before).total_seconds() for before, after in pairwise(ends))
    spent = (now - ends[-1]).total_seconds()
    if spent > max(_STALLED * length, _STALLED_SECONDS):
        # A run that stands still ends nobody knows when.
        return None
    return max(0.0, length * (len(view.stages) - view.run.done) - min(length, max(0.0, spent)))


def _head(view: RunView, *, now: datetime) -> Iterator[Text]:
    run = view.run
    title = Text.assemble(
        (shown_name(run.name), "bold"), f"  {run.job[:DIGITS]}  ", (run.state, _STATES.get(run.state, ""))
    )
    yield title.append(f"  epsilon {printed(run.epsilon)} planned, {len(view.participants)} sites")
    done = f"{run.done} of {run.stages} stages done"
    going = run.state == "on" and run.done < run.stages
    yield Text(f"{done}, now {_stage_name(view, run.done + 1)}" if going else done)
    if run.began:
        took = (now if run.state == "on" else _read(run.changed)) - _read(run.began)
        left = seconds_left(view, now=now)
        rest = timedelta(seconds=left or 0)
        until = f"; about {_span(rest)} left, until {now.astimezone() + rest:%H:%M}" if left is not None else ""
        yield Text(f"begun {moment(run.began)}, {_span(took)} {'ago' if going else 'in all'}{until}")
    if run.why:
        yield Text(plain(run.why), style="red")


def _grid(view: RunView, *, width: int, lines: int) -> Iterator[Text]:
    longest = max(map(len, view.participants))
    room = min(longest, _MOST_NAME, max(_LEAST_NAME, width - 2 - len(view.stages)))
    a_cell = math.ceil(len(view.stages) / max(1, width - 2 - room))
    columns = math.ceil(len(view.stages) / a_cell)
    ticks = "".join(f"{(column + _TICK) * a_cell:>{_TICK}}" for column in range(0, columns - _TICK + 1, _TICK))
    if ticks:
        yield Text(f"{'':{room}}  {ticks}", style="bright_black")
    shown, others = _chosen(view, lines)
    for site in shown:
        cells = view.cells(site)
        row = Text(f"{_short(site, room):{room}}  ", style="bright_black" if site in view.revoked else "")
        worst = (min(cells[start : start + a_cell], key=list(_LOOKS).index) for start in range(0, len(cells), a_cell))
        for cell, alike in groupby(worst):
            character, style = _LOOKS[cell]
            row.append(character * len(list(alike)), style=style)
        yield row
    if others:
        yield Text(others, style="bright_black")
    if a_cell > 1:
        yield Text(f"A column is {a_cell} stages, and shows the worst of them.", style="bright_black")


def _chosen(view: RunView, lines: int) -> tuple[Sequence[SiteId], str]:
    """The sites that get a line of their own, and what is said of the others: first those that are missing now."""
    if len(view.participants) <= lines:
        return view.participants, ""
    eventful = {"refused", "silent", "resting", "out"}
    gaps = {site for site in view.participants if eventful & set(view.cells(site))}
    missing = view.missing.keys() | set(view.awaited.sites)
    ranked = sorted(view.participants, key=lambda site: (site not in missing, site not in gaps, site))
    shown, others = sorted(ranked[:lines]), ranked[lines:]
    late = sum(site in gaps for site in others)
    said = f"{late} of them have missed a stage" if late else "which have answered every stage so far"
    return shown, f"and {len(others)} more sites, {said}"


def _legend() -> Text:
    legend = Text()
    for cell, words in _WORDS.items():
        character, style = _LOOKS[cell]
        legend.append(character, style=style).append(f" {words}  ", style="bright_black")
    return legend


def _waiting(view: RunView, *, now: datetime) -> Text:
    asked, names = _read(view.awaited.asked), list(view.awaited.sites)
    named = ", ".join(names[:_MOST_MISSING]) + (
        f" and {len(names) - _MOST_MISSING} more" if names[_MOST_MISSING:] else ""
    )
    return Text(f"Waiting for {named}: asked {_span(now - asked)} ago", style="cyan")


def _missing(view: RunView) -> Iterator[Text]:
    missing = view.missing
    said = {site: refused for site, refused in view.refusals.sites.items() if site not in missing}
    for site, since in list(missing.items())[:_MOST_MISSING]:
        how = "revoked" if site in view.revoked else _WORDS[view.progress[-1].absent[site]]
        line = Text.assemble((site, "bold"), f" missing since stage {since.stage}, {_clock(since.finished)}: {how}")
        refused = view.refusals.sites.get(site)
        yield line.append(f"; {plain(refused.words)}" if refused else "")
    if len(missing) > _MOST_MISSING:
        yield Text(f"and {len(missing) - _MOST_MISSING} more")
    # Who said no and was back since, or has not been asked in a stage yet: an approval that is waited for, say.
    for site, refused in sorted(said.items(), key=lambda one: one[1].time)[-_MOST_MISSING:]:
        yield Text.assemble((site, "bold"), f" said at {_clock(refused.time)}: {plain(refused.words)}")


def _stage_name(view: RunView, number: int) -> str:
    stage = view.stages[number - 1]
    rounds = sum(each.purpose == "train" for each in view.stages)
    return f"training round {stage.round_index + 1} of {rounds}" if stage.purpose == "train" else stage.purpose


def _short(site: SiteId, room: int) -> str:
    return site if len(site) <= room else site[: room - 1] + "…"


def _span(length: timedelta) -> str:
    seconds = max(0, int(length.total_seconds()))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _clock(time: str) -> str:
    return f"{_read(time).astimezone():%H:%M:%S}"


def _read(time: str) -> datetime:
    return datetime.fromisoformat(time).astimezone(UTC)


def plain(text: str) -> str:
    """``text`` without characters that steer a terminal: it is other people's."""
    return "".join(character if character.isprintable() else "?" for character in text)
