"""``fedgrade site leave``: the node ends for good, and the coordinator gets it in writing."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from clients.agent import AgentClient, LeaveRefused, listens, undelivered_words
from clients.settings import read_site

if TYPE_CHECKING:
    from clients.settings import SiteFolder

SITE_FILE: Final = click.Path(path_type=Path, dir_okay=False)
_END_SECONDS: Final = 120.0
_LOOK_SECONDS: Final = 0.1


@click.command(epilog="Example: fedgrade site leave site.yaml")
@click.argument("site_file", type=SITE_FILE)
@click.option("--undelivered", "even_so", is_flag=True, help="Also with answers that never reached the coordinator.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def leave(site_file: Path, *, even_so: bool, yes: bool) -> None:
    """Leave the federation: end the node, and write a signed notice for the coordinator.

    Refused while answers that your items paid for have not reached the coordinator.
    """
    # Imported here: X.509 takes a moment, and `fedgrade site --help` should not wait for it.
    from clients.leaving import leave as write_notice  # noqa: PLC0415
    from clients.leaving import notice_file, require_not_left  # noqa: PLC0415

    site = read_site(site_file)
    require_not_left(site)
    _require_delivered(site, even_so=even_so)
    click.echo(
        f"{site.settings.site} finishes the answer that it is at, ends, and does not start again before another "
        "`fedgrade site join`.\n"
        "A run that is on goes on without it, if enough others are left.\n"
        "With your notice the coordinator takes it off the roster for good: neither name nor key comes back.\n"
        "What it contributed stays in models and ledgers. Its keys, its ledger and what its items spent stay here."
    )
    if not yes:
        click.confirm("Leave?", abort=True)
    _end_node(site, even_so=even_so)
    # Once more: the last answer may have been under way.
    _require_delivered(site, even_so=even_so)
    notice = write_notice(site, now=datetime.now(UTC))
    # Of a node that was being started, and looked for the notice before it was there.
    _end_node(site, even_so=True)
    click.echo(f"Send {notice_file(site)} to the coordinator, who gives it to `fedgrade revoke --notice`.")
    click.echo(f"It is signed by {notice.key.fingerprint} and holds nothing secret.")


def _require_delivered(site: "SiteFolder", *, even_so: bool) -> None:
    from fedgrade.federation.outbox import Outbox  # noqa: PLC0415 - as above

    waiting = Outbox(site.path(site.settings.outbox)).undelivered
    if waiting and not even_so:
        raise LeaveRefused(undelivered_words(waiting))


def _end_node(site: "SiteFolder", *, even_so: bool) -> None:
    if listens(site.socket):
        with AgentClient(site.socket) as client:
            client.leave(even_so=even_so)
        _wait_for_end(site)


def _wait_for_end(site: "SiteFolder") -> None:
    deadline = time.monotonic() + _END_SECONDS
    while listens(site.socket):
        if time.monotonic() > deadline:
            raise LeaveRefused("the node is still at its last answer; it ends by itself, so run this again in a while")
        time.sleep(_LOOK_SECONDS)
