"""``fedgrade site``: what a partner types. The one place where a node's process is put together."""

import logging
import re
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import click

from clients.agent import AgentClient, AgentServer, AgentStatus, Words
from clients.approval_commands import approve, decline, jobs
from clients.gate import Gate
from clients.join_commands import init, join, request
from clients.leave_command import leave
from clients.leaving import require_not_left
from clients.newest import NewestLink, by_newest_roster
from clients.node import LinkState, log_state, serve
from clients.settings import read_site
from fedgrade.errors import DocumentRefused
from fedgrade.logs import configure_logs
from fedgrade.trust.identity import SigningKey
from fedgrade.trust.records import AccountKey, Partition

_NUMBER = re.compile(r"-?[0-9]{1,20}(/0*[1-9][0-9]{0,19}|\.[0-9]{1,20})?")
SITE_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(epilog="Example: fedgrade site up site.yaml")
def site() -> None:
    """Run this partner's node, and look after it."""


for _command in (init, request, join, jobs, approve, decline, leave):
    site.add_command(_command)


@site.command(epilog="Example: fedgrade site up site.yaml")
@click.argument("site_file", type=SITE_FILE)
def up(site_file: Path) -> None:
    """Start this site's node and keep it running until it is drained or stopped."""
    # Imported here: torch takes seconds, and `fedgrade site status` should not wait for it.
    import torch  # noqa: PLC0415

    from clients.configure import open_site  # noqa: PLC0415

    configure_logs(logging.INFO)
    settings = read_site(site_file)
    require_not_left(settings)
    # First of all: a site that has not joined yet should not load a network to say so.
    where = NewestLink(site_file)
    torch.set_num_threads(settings.settings.threads)
    partner, charging = open_site(settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    link = _LinkWord()
    gate = Gate(by_newest_roster(settings, partner.take_roster, partner.answer))
    words = Words(
        link=link.read,
        activity=lambda: partner.activity,
        standings=lambda: partner.standings,
        undelivered=lambda: partner.undelivered,
    )
    with charging, AgentServer(gate, settings.socket, words=words, on_delivered=partner.delivered):
        # Once more: whoever left while the site was opened found nobody at the socket to tell.
        require_not_left(settings)
        threading.Thread(target=_stop_when_drained, args=(gate, stop), daemon=True).start()
        serve(where, gate.answer, stop=stop, on_state=link.write, on_delivered=partner.delivered)


@site.command(epilog="Example: fedgrade site status --watch site.yaml")
@click.argument("site_file", type=SITE_FILE)
@click.option("--watch", is_flag=True, help="Stay, and show it anew every second, until Ctrl-C.")
def status(site_file: Path, *, watch: bool) -> None:
    """Show the node's connection, what it is at, its last refusal, and a bar for each account's budget."""
    from clients.status_page import show, watched  # noqa: PLC0415 - tables take a moment to load

    with AgentClient(read_site(site_file).socket) as client:
        if watch:
            watched(client.status)
        else:
            show(client.status())


@site.command(epilog="Example: fedgrade site pause site.yaml")
@click.argument("site_file", type=SITE_FILE)
def pause(site_file: Path) -> None:
    """Answer nothing until resumed; the coordinator gets an error at once, and may ask again later."""
    _ask(site_file, AgentClient.pause)


@site.command(epilog="Example: fedgrade site resume site.yaml")
@click.argument("site_file", type=SITE_FILE)
def resume(site_file: Path) -> None:
    """Answer again."""
    _ask(site_file, AgentClient.resume)


@site.command(epilog="Example: fedgrade site drain site.yaml")
@click.argument("site_file", type=SITE_FILE)
def drain(site_file: Path) -> None:
    """Finish the answer under way, then end the node's process."""
    _ask(site_file, AgentClient.drain)


@site.command(
    epilog='Example: fedgrade site correct site.yaml --cohort 2026-11 --side train --rho 1/500 --reason "clip was off"'
)
@click.argument("site_file", type=SITE_FILE)
@click.option("--cohort", required=True, help="Whose items spent more than the ledger says.")
@click.option("--side", type=click.Choice(["train", "test"]), required=True, help="Training or held-out items.")
@click.option("--rho", required=True, help="How much more: of zero-concentrated privacy, exact, as 1/500 or 0.002.")
@click.option("--reason", required=True, help="What went wrong, in one line; auditors read it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def correct(site_file: Path, cohort: str, side: Partition, rho: str, reason: str, *, yes: bool) -> None:
    """Put on record that items have spent more privacy than was charged. This is never taken back.

    The node must not be running: drain it first.
    """
    # Imported here: the accountant takes a second, and `fedgrade site status` should not wait for it.
    from fedgrade.federation.charging import Charging  # noqa: PLC0415
    from fedgrade.privacy.accounting import printed  # noqa: PLC0415

    folder = read_site(site_file)
    amount = _exact(rho)
    account = AccountKey(partner=folder.settings.site, lineage=folder.settings.lineage, cohort=cohort, partition=side)
    if not yes:
        click.confirm(f"Charge {cohort}/{side} rho {float(amount):g} more, for good?", abort=True)
    key = SigningKey.load(folder.path(folder.settings.key))
    ledger = folder.path(folder.settings.ledger)
    if not ledger.exists():
        raise DocumentRefused(f"ledger {ledger}: there is none yet, so that nothing was spent")
    with Charging.open(ledger, site=folder.settings.site, key=key, clock=lambda: datetime.now(UTC)) as charging:
        after = charging.correct(account, rho=amount, reason=reason)
    click.echo(f"on record; {cohort}/{side} has spent epsilon {printed(after)} in all")


def _exact(text: str) -> Fraction:
    """The exact fraction in ``text``, which a person typed; huge ones could not even be written down."""
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    raise click.BadParameter(f"{text[:40]!r} is no exact number; write 1/500 or 0.002", param_hint="--rho")


class _LinkWord:
    """The node's last word on its connection, for whoever asks through the socket."""

    def __init__(self) -> None:
        self._word = "connecting"

    def write(self, state: LinkState) -> None:
        log_state(state)
        self._word = f"{state.phase}: {state.detail}" if state.detail else str(state.phase)

    def read(self) -> str:
        return self._word


def _stop_when_drained(gate: Gate, stop: threading.Event) -> None:
    gate.drained.wait()
    stop.set()


def _ask(site_file: Path, question: Callable[[AgentClient], AgentStatus]) -> None:
    with AgentClient(read_site(site_file).socket) as client:
        told = question(client)
    busy = "answering now" if told.answering else "idle"
    click.echo(f"{told.mode}, {busy}, {told.answered} requests answered; link {told.link or 'none'}")
