"""The report's two plots, as SVG that stands in the page: no display, no script, no date, the same bytes every time.

The one file that knows matplotlib. Each plot is drawn twice, for paper and for a telephone; the style sheet shows one.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fedgrade.report.words import epsilon_text

MAX_BARS = 40
MAX_LINES = 6
_WIDE, _NARROW = 7.3, 3.7  # inches, before the page scales them
_INCHES_A_LETTER = 0.085
_MAX_JOINT_LABEL = 22  # characters
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedgrade",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.linewidth": 0.6,
    "axes.unicode_minus": True,
}
# Stand-ins that the style sheet's own colours replace, so that dark paper gets light ink.
_INK, _MUTED, _RULE, _TRACK = "#101112", "#606162", "#c0c1c2", "#e0e1e2"
_TRAINING, _HELD_OUT = "#205081", "#7a9cbf"
_LINES = (_TRAINING, "#a04020", "#3a7050", "#806020", "#604080", "#406070")
_INKS = {
    _INK: "ink",
    _MUTED: "muted",
    _RULE: "rule",
    _TRACK: "track",
    _TRAINING: "line-1",
    _HELD_OUT: "held-out",
    **{colour: f"line-{index}" for index, colour in enumerate(_LINES, start=1)},
}


@dataclass(frozen=True, kw_only=True)
class BudgetBar:
    """One account: whose, which side of its items, and what it has used of what it may ever use."""

    label: str
    training: bool
    used: float
    ceiling: float


@dataclass(frozen=True, kw_only=True)
class SpendingLine:
    """One account's epsilon after each of its charges, and the ceiling that stood at each."""

    label: str
    epsilons: tuple[float, ...]
    ceilings: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One plot in two widths."""

    wide: Markup
    narrow: Markup


def budget_bars(bars: Sequence[BudgetBar], *, description: str) -> Drawing:
    """Horizontal bars, at most :data:`MAX_BARS`, in the order given; the tick at each bar's right is its ceiling."""
    shown = tuple(bars[:MAX_BARS])
    return _both(
        "budget",
        "Epsilon used against each account's lifetime ceiling",
        description,
        draw=lambda width: _draw_bars(shown, width),
    )


def spending_lines(lines: Sequence[SpendingLine], *, description: str) -> Drawing:
    """Epsilon over charges, one line a site; sites whose accounts moved alike share a line. Named are the highest."""
    return _both(
        "spending",
        "Epsilon of each training account after each charge",
        description,
        draw=lambda width: _draw_lines(merged(lines), width),
    )


def _both(name: str, title: str, description: str, *, draw: Callable[[float], Figure]) -> Drawing:
    with mpl.rc_context(_STYLE):
        return Drawing(
            wide=_svg(draw(_WIDE), name=f"{name}-wide", title=title, description=description),
            narrow=_svg(draw(_NARROW), name=f"{name}-narrow", title=title, description=description),
        )


def _draw_bars(bars: Sequence[BudgetBar], width: float) -> Figure:
    """Wide: names left of the bars. Narrow: names above them."""
    narrow = width < _WIDE
    left = min(2.6, 0.95 + _INCHES_A_LETTER * max(len(bar.label) for bar in bars))
    row, left, right = (0.44, 0.05, 0.05) if narrow else (0.2, left, 0.95)
    places = _bar_places(bars)
    figure, axes = _sheet(width, row * (places[-1] + 1) + 0.45, left=left, right=right, bottom=0.45, top=0.0)
    limit = max(bar.ceiling for bar in bars)
    offset, thickness = (0.2, 0.3) if narrow else (0.0, 0.56)
    for index, bar in enumerate(bars):
        place = places[index] + offset
        axes.barh(place, bar.ceiling, height=thickness, color=_TRACK, linewidth=0)
        axes.barh(
            place, bar.used, height=thickness, color=_TRAINING if bar.training else _HELD_OUT, linewidth=0, zorder=2
        )
        reach = thickness / 2 + (0.06 if narrow else 0.1)
        axes.plot([bar.ceiling] * 2, [place - reach, place + reach], color=_INK, linewidth=1.1, clip_on=False, zorder=3)
        value = f"{epsilon_text(bar.used)} of {bar.ceiling:.2f}"
        side = "training" if bar.training else "held-out"
        if narrow:
            _text(axes, 0, place - 0.38, f"{bar.label} · {side}", color=_INK)
            _text(axes, limit, place - 0.38, value, color=_MUTED, horizontalalignment="right")
        else:
            first = index == 0 or bars[index - 1].label != bar.label
            inches = limit / (width - left - right)
            _text(axes, -left * inches, place, bar.label if first else "", color=_INK)
            _text(axes, -0.08 * inches, place, side, color=_MUTED, horizontalalignment="right")
            _text(axes, limit + 0.12 * inches, place, value, color=_INK)
    axes.set_xlim(0, limit)
    axes.set_ylim(places[-1] + 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel("epsilon used; the upright mark is the ceiling", color=_MUTED, loc="left")
    axes.spines["left"].set_visible(False)
    return figure


def _bar_places(bars: Sequence[BudgetBar]) -> tuple[float, ...]:
    """Rows from the top, with a little air between sites."""
    places = [0.0]
    for before, bar in pairwise(bars):
        places.append(places[-1] + (1.0 if before.label == bar.label else 1.35))
    return tuple(places)


def _draw_lines(groups: Sequence[SpendingLine], width: float) -> Figure:
    narrow = width < _WIDE
    left, right = (0.42, 0.08) if narrow else (0.48, 1.75)
    figure, axes = _sheet(width, 2.7, left=left, right=right, bottom=0.48, top=0.14)
    longest = max(len(group.epsilons) for group in groups)
    highest = max(max(group.ceilings) for group in groups)
    for index, group in enumerate(groups):
        colour, front = _LINES[index] if index < MAX_LINES else _RULE, 4 - index / len(groups)
        places = range(len(group.epsilons) + 1)
        axes.step(places, (0.0, *group.epsilons), where="post", color=colour, linewidth=1.6, zorder=front)
        axes.plot(len(group.epsilons), group.epsilons[-1], "o", color=colour, markersize=3.6, clip_on=False, zorder=5)
    for ceilings in sorted({_prolonged(group.ceilings, longest) for group in groups}):
        heights = (ceilings[0], *ceilings)
        axes.step(range(longest + 1), heights, where="pre", color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(0, longest)
    axes.set_ylim(0, highest * 1.06)
    axes.grid(axis="y", color=_RULE, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_xlabel("releases charged to the account", color=_MUTED, loc="left")
    axes.set_ylabel("epsilon so far", color=_MUTED)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _label_lines(axes, groups[:MAX_LINES], longest=longest, top=highest * 1.06, narrow=narrow)
    return figure


def _prolonged(ceilings: tuple[float, ...], length: int) -> tuple[float, ...]:
    """The last ceiling stands until it is changed."""
    return ceilings + ceilings[-1:] * (length - len(ceilings))


def _label_lines(axes: Any, groups: Sequence[SpendingLine], *, longest: int, top: float, narrow: bool) -> None:
    """Names at the ends of lines, moved apart where they would touch; narrow: stacked where there is no line."""
    gap = top * 0.085
    inch = longest / 3.2 if narrow else longest / 5.1
    names = [f"{group.label} {epsilon_text(group.epsilons[-1])}" for group in groups]
    if narrow:
        lowest = min(group.epsilons[-1] for group in groups)
        below = lowest > gap * (len(groups) + 1.5)
        first = lowest - gap * 1.5 if below else groups[0].epsilons[-1] + gap * len(groups)
        for rank, name in enumerate(names):
            place = first - rank * gap
            _text(axes, longest - 0.06 * inch, place, name, color=_LINES[rank], horizontalalignment="right")
    else:
        place = -top
        for rank in reversed(range(len(groups))):
            place = max(groups[rank].epsilons[-1], place + gap)
            _text(axes, longest + 0.12 * inch, place, names[rank], color=_LINES[rank])
    _label_ceilings(axes, sorted({group.ceilings[-1] for group in groups}, reverse=True), x=0.06 * inch, gap=gap)


def _label_ceilings(axes: Any, ceilings: Sequence[float], *, x: float, gap: float) -> None:
    """The highest ceiling's name beneath its line, and as many of the others' as do not touch."""
    place = ceilings[0] + 2 * gap
    for ceiling in ceilings:
        if place - ceiling > 1.2 * gap:
            _text(axes, x, ceiling - gap * 0.7, f"lifetime ceiling {ceiling:.2f}", color=_INK)
            place = ceiling


def merged(lines: Sequence[SpendingLine]) -> tuple[SpendingLine, ...]:
    """Lines that coincide, as one line that says how many it stands for; the highest first."""
    alike: dict[tuple[tuple[float, ...], tuple[float, ...]], list[str]] = {}
    for line in lines:
        alike.setdefault((line.epsilons, line.ceilings), []).append(line.label)
    merged = [
        SpendingLine(label=_joint_label(labels, of=len(lines)), epsilons=epsilons, ceilings=ceilings)
        for (epsilons, ceilings), labels in alike.items()
    ]
    return tuple(sorted(merged, key=lambda line: (-line.epsilons[-1], line.label)))


def _joint_label(labels: Sequence[str], *, of: int) -> str:
    if len(labels) == of > 1:
        return f"all {of} sites"
    joint = ", ".join(labels)
    return joint if len(labels) == 1 or len(joint) <= _MAX_JOINT_LABEL else f"{len(labels)} sites"


def _sheet(width: float, height: float, *, left: float, right: float, bottom: float, top: float) -> tuple[Figure, Any]:
    """A figure of ``width`` by ``height`` and axes inside the margins, all in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelcolor=_MUTED, width=0.6, length=3)
    return figure, axes


def _text(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Words at a place in data units, never read as mathematics: names are other people's."""
    axes.text(x, y, text, parse_math=False, verticalalignment="center", **style)


def _svg(figure: Figure, *, name: str, title: str, description: str) -> Markup:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # A name in a script that DejaVu lacks is laid out roughly and then set in the reader's own font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="svg", metadata=nothing)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # Two plots in one page must not share identifiers.
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    drawing = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{name}-", drawing)
    for stand_in, ink in _INKS.items():
        drawing = drawing.replace(stand_in, f"var(--{ink})")
    return _with_words(drawing, name=name, title=title, description=description)


def _with_words(drawing: str, *, name: str, title: str, description: str) -> Markup:
    """``drawing`` sized by the page, with a title and description for who cannot see it."""
    box = re.search(r'viewBox="([^"]+)"', drawing)
    if box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    opening = Markup(
        '<svg class="plot" viewBox="{box}" role="img" aria-labelledby="{name}-title {name}-description" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        '<title id="{name}-title">{title}</title><desc id="{name}-description">{description}</desc>'
    ).format(box=box.group(1), name=name, title=title, description=escape(description))
    # matplotlib has escaped every text inside its own drawing.
    return opening + Markup(drawing[drawing.index(">") + 1 :])  # noqa: S704
