"""How a site stands, for the eyes of its operator: once, or again every second."""

import math
import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clients.agent import AgentStatus, AgentUnavailable

_BAR = 24  # characters
_NEARLY = 0.9  # of a ceiling, from where on a bar warns
_REFRESH_SECONDS = 1.0


def show(status: AgentStatus) -> None:
    """Print ``status`` once."""
    Console(soft_wrap=True, highlight=False).print(page(status))


def watched(ask: Callable[[], AgentStatus]) -> None:
    """Show what ``ask`` says, again every second, until interrupted; a node that went away is waited for."""
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            try:
                live.update(page(ask()), refresh=True)
            except AgentUnavailable as error:
                live.update(Text(str(error), style="red"), refresh=True)
            time.sleep(_REFRESH_SECONDS)


def page(status: AgentStatus) -> RenderableType:
    """``status`` as a person reads it."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    busy = "answering now" if status.answering else "idle"
    facts.add_row("site", f"{status.mode}, {busy}, {status.answered} requests answered")
    facts.add_row("link", _plain(status.link or "none"))
    doing = status.activity
    facts.add_row("job", _plain(f"{doing.job}: {doing.stage}" if doing.job else "none yet"))
    facts.add_row("last refusal", _plain(doing.refusal or "none"))
    if status.undelivered:
        facts.add_row("undelivered", f"{status.undelivered} of the answers that were charged for")
    if not status.budgets:
        return Group(facts, Text("no data is under account yet"))
    budgets = Table("cohort", "items", "epsilon spent", "", "ceiling", box=None, pad_edge=False)
    for cohort, side, epsilon, ceiling in status.budgets:
        budgets.add_row(
            _plain(cohort), side, f"{math.ceil(epsilon * 100) / 100:.2f}", _bar(epsilon, ceiling), f"{ceiling:.2f}"
        )
    return Group(facts, budgets)


def _bar(epsilon: float, ceiling: float) -> Text:
    share = min(1.0, epsilon / ceiling) if ceiling > 0 else 1.0
    full = round(_BAR * share)
    return Text("█" * full + "·" * (_BAR - full), style="red" if share >= _NEARLY else "blue")


def _plain(text: str) -> Text:
    """``text`` without characters that steer a terminal: job names are other people's."""
    return Text("".join(character if character.isprintable() else "?" for character in text))
