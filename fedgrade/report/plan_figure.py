"""A planned job as a drawing: epsilon of each training account over the rounds to come, under its ceiling.

The same sheet, inks and words as the report's plots, but a file of its own: colours are fixed and no style sheet is
needed. The same forecast gives the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# The neighbour's pencils: one file knows matplotlib.
from fedgrade.report.figures import (
    _INK,
    _LINES,
    _MUTED,
    _RULE,
    MAX_LINES,
    _both,
    _joint_label,
    _label_ceilings,
    _sheet,
    _text,
)
from fedgrade.report.words import epsilon_text

_STYLE_SHEET = Path(__file__).with_name("report.css")
_HEAD = '<?xml version="1.0" encoding="utf-8"?>\n'


@dataclass(frozen=True, kw_only=True)
class PlannedLine:
    """One account: epsilon after so many of the job's releases, and its lifetime ceiling if one is known."""

    label: str
    path: tuple[tuple[int, float], ...]
    ceiling: float | None


def plan_plot(lines: Sequence[PlannedLine], *, description: str) -> bytes:
    """A whole SVG document; accounts that move alike share a line, and the highest six are named.

    Epsilons must be finite: an account that cannot express the job has no line.
    """
    shown = merged_lines(lines)
    title = "Epsilon of each training account over the planned rounds"
    drawing = _both("plan", title, description, draw=lambda width: _draw(shown, width)).wide
    coloured = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: _paper_inks()[found.group(1)], str(drawing))
    return (_HEAD + coloured.replace('class="plot"', 'width="100%"', 1) + "\n").encode()


@cache
def _paper_inks() -> dict[str, str]:
    """The report's inks as its style sheet has them for paper, which it states before those for the dark."""
    found = re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", _STYLE_SHEET.read_text())
    return dict(reversed(found))


def merged_lines(lines: Sequence[PlannedLine]) -> tuple[PlannedLine, ...]:
    """Lines that coincide, as one that says how many it stands for; the highest first."""
    alike: dict[tuple[tuple[tuple[int, float], ...], float | None], list[str]] = {}
    for line in lines:
        alike.setdefault((line.path, line.ceiling), []).append(line.label)
    joined = [
        PlannedLine(
            label=_joint_label(labels, of=len(lines)),
            path=path,
            ceiling=ceiling,
        )
        for (path, ceiling), labels in alike.items()
    ]
    return tuple(sorted(joined, key=lambda line: (-line.path[-1][1], line.label)))


def _draw(lines: Sequence[PlannedLine], width: float) -> Any:
    figure, axes = _sheet(width, 2.7, left=0.48, right=1.75, bottom=0.48, top=0.14)
    ceilings = sorted({line.ceiling for line in lines if line.ceiling is not None}, reverse=True)
    last = max(line.path[-1][0] for line in lines)
    top = 1.06 * max([*ceilings, *(line.path[-1][1] for line in lines)])
    for rank, line in enumerate(lines):
        colour = _LINES[rank] if rank < MAX_LINES else _RULE
        rounds, epsilons = zip(*line.path, strict=True)
        axes.plot(rounds, epsilons, color=colour, linewidth=1.6, zorder=4 - rank / len(lines))
        axes.plot(rounds[-1], epsilons[-1], "o", color=colour, markersize=3.6, clip_on=False, zorder=5)
    for ceiling in ceilings:
        axes.axhline(ceiling, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(0, last)
    axes.set_ylim(0, top)
    axes.grid(axis="y", color=_RULE, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_xlabel("releases of this job: the feature centre, then one a round", color=_MUTED, loc="left")
    axes.set_ylabel("epsilon after them", color=_MUTED)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _name(axes, lines[:MAX_LINES], ceilings, last=last, top=top)
    return figure


def _name(axes: Any, lines: Sequence[PlannedLine], ceilings: Sequence[float], *, last: int, top: float) -> None:
    """Names at the ends of lines, moved apart where they would touch; ceilings are named beneath their line."""
    gap, inch, place = top * 0.085, last / 5.1, -top
    for rank in reversed(range(len(lines))):
        epsilon = lines[rank].path[-1][1]
        place = max(epsilon, place + gap)
        name = f"{lines[rank].label} {epsilon_text(epsilon)}"
        _text(axes, last + 0.12 * inch, place, name, color=_LINES[rank])
    if ceilings:
        _label_ceilings(axes, ceilings, x=0.06 * inch, gap=gap)
