"""``fedgrade coordinator``, ``serve``, ``enrol``, ``revoke``, ``roster``, ``stop``: a coordinator and its partners."""

import signal
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fedgrade.cli.out_of_band import require_fingerprint
from fedgrade.errors import DocumentRefused, FedgradeError
from fedgrade.trust.enrolment import MAX_PAPER_BYTES, JoinRequest
from fedgrade.trust.identity import SigningKey, SiteId, site_id
from server.authority_command import rotate_authority
from server.coordinator_file import ADMIN_PORT, FILES, PUBLIC_PORT, CoordinatorSettings
from server.coordinator_folder import CoordinatorFolder

FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path, file_okay=False, exists=True)


@click.group(epilog="Example: fedgrade coordinator init federation --host coordinator.example")
def coordinator() -> None:
    """Set up the coordinator's side of a federation."""


@coordinator.command(epilog="Example: fedgrade coordinator init federation --host coordinator.example")
@click.argument("folder", type=FOLDER)
@click.option("--host", required=True, help="The name or address by which partners will reach this machine.")
@click.option("--public-port", type=click.IntRange(1, 65535), default=PUBLIC_PORT, show_default=True)
@click.option("--admin-port", type=click.IntRange(1, 65535), default=ADMIN_PORT, show_default=True)
@click.option("--interface", default="0.0.0.0", show_default=True, help="Address on which partners reach it.")  # noqa: S104
@click.option(
    "--database", default=FILES, show_default=True, help="Keep runs and enrolments there: postgresql://user@host/name."
)
def init(folder: Path, *, host: str, public_port: int, admin_port: int, interface: str, database: str) -> None:
    """Make a coordinator in FOLDER: its key, its authority, an empty roster, coordinator.yaml.

    Nothing is overwritten. Keep FOLDER readable by one user alone, and back up FOLDER/coordinator.
    """
    from server.enrolment import create_coordinator  # noqa: PLC0415 - X.509 and the ledger take a moment

    settings = CoordinatorSettings(
        host=host, public_port=public_port, admin_port=admin_port, interface=interface, database=database
    )
    public = create_coordinator(folder, settings, now=datetime.now(UTC))
    click.echo(f"{folder}: a coordinator at {settings.address}, with nobody on its roster yet")
    click.echo(f"Tell every partner, over another channel, its fingerprint: {public.fingerprint}")


coordinator.add_command(rotate_authority)


@click.command(epilog="Example: fedgrade serve federation")
@click.argument("folder", type=EXISTING)
def serve(folder: Path) -> None:
    """Run the SuperLink of the federation in FOLDER: partners' nodes connect, and jobs may be run.

    Whom `fedgrade enrol` and `fedgrade revoke` name meanwhile is let in or put out at once. Ctrl-C and SIGTERM end it;
    a run that was on goes on from its checkpoint when this folder is served again, as it does at once if the SuperLink
    dies and is started again by this command.
    """
    # Imported here: Flower takes a second.
    from server.certificates import fingerprint  # noqa: PLC0415
    from server.serving import serve_folder  # noqa: PLC0415

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def tell(address: str, authority: Path) -> None:
        click.echo(f"SuperLink at {address}; authority {fingerprint(authority)}; Ctrl-C stops it")

    serve_folder(folder, stop=stop, on_up=tell)
    click.echo("stopped")


@click.command(epilog="Example: fedgrade enrol federation recycler-a.json --fingerprint '85f6 a26a a1f0 a696 …'")
@click.argument("folder", type=EXISTING)
@click.argument("join_request", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--fingerprint", help="The partner's, as it was told to you over another channel.")
def enrol(folder: Path, join_request: Path, fingerprint: str | None) -> None:
    """Put the partner that signed JOIN_REQUEST on the roster of FOLDER, and write a new bundle for everybody.

    A newer request by an enrolled partner, with the same key, replaces its number of items and its connection key.
    """
    from server.enrolment import enrol as put_on_roster  # noqa: PLC0415

    def approve(request: JoinRequest) -> None:
        click.echo(f"{request.site} publishes {request.declared_items} training items")
        require_fingerprint(request.key, given=fingerprint, whose=request.site)

    if join_request.stat().st_size > MAX_PAPER_BYTES:
        raise DocumentRefused(f"{join_request}: over {MAX_PAPER_BYTES} bytes; a join request is smaller")
    own = CoordinatorFolder(root=folder)
    request = put_on_roster(own, join_request.read_bytes(), approve=approve, now=datetime.now(UTC))
    click.echo(f"{request.site} is enrolled{_taken_note_of(folder, request.site, enrolled=True)}")
    click.echo(f"Give every partner {own.bundle}, and over another channel the coordinator's fingerprint: {_own(own)}")


@click.command(epilog='Example: fedgrade revoke federation recycler-a --reason "key was stolen"')
@click.argument("folder", type=EXISTING)
@click.argument("site", required=False)
@click.option("--reason", help="Why, in one line; auditors read it.")
@click.option(
    "--notice", type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The partner's own leave notice, in place of SITE and --reason.",
)  # fmt: skip
def revoke(folder: Path, site: str | None, reason: str | None, notice: Path | None) -> None:
    """Take SITE off the roster of FOLDER, for good: a SuperLink that runs refuses it at once, also in mid-round.

    What it contributed before stays in the ledger and in the models. Neither its name nor its key comes back. A partner
    that leaves by itself writes a notice with `fedgrade site leave`; it is checked, kept, and named as the reason.
    """
    own, began = CoordinatorFolder(root=folder), time.monotonic()
    if notice is not None and site is None and reason is None:
        name = _revoked_by(own, notice)
    elif notice is None and site is not None and reason is not None:
        from server.enrolment import revoke as take_off_roster  # noqa: PLC0415

        name = site_id(site)
        take_off_roster(own, name, reason=reason, now=datetime.now(UTC))
    else:
        raise click.UsageError("give either SITE and --reason, or --notice, which says both")
    click.echo(f"{name} is revoked{_taken_note_of(folder, name, enrolled=False)} ({time.monotonic() - began:.1f} s)")
    click.echo(f"Give every partner the new {own.bundle}")


@click.command(epilog="Example: fedgrade roster federation")
@click.argument("folder", type=EXISTING)
def roster(folder: Path) -> None:
    """List who is enrolled in FOLDER, since when, and whether its node is online; and who was revoked, and why."""
    from server.enrolment import read_book  # noqa: PLC0415

    own = CoordinatorFolder(root=folder)
    book = read_book(own)
    online: set[SiteId] | None = None
    unknown = ""
    try:
        online = _online(folder)
    except FedgradeError as error:
        # Who is enrolled stands in the folder; a SuperLink that is being started again hides nobody.
        unknown = str(error)
    click.echo(f"coordinator {_own(own)}")
    members = book.membership
    table = Table("site", "fingerprint", "items", "since", "node", box=None)
    for site, body in sorted(members.current.items()):
        since = next(event.time for event in book.events if event.body.site == site)
        state = "unknown" if online is None else "online" if site in online else "offline"
        table.add_row(site, body.key.fingerprint, str(body.declared_items), since[:16], state)
    for site, gone in sorted(members.former.items()):
        table.add_row(site, gone.key.fingerprint, "", "", f"revoked {book.last(site).time[:16]}: {gone.reason}")
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
    if online is None:
        click.echo(f"Who is online is not known: {unknown}")


@click.command(epilog="Example: fedgrade stop federation")
@click.argument("folder", type=EXISTING)
def stop(folder: Path) -> None:
    """End the run that is on in FOLDER; its checkpoint stands, and `fedgrade resume` goes on from there.

    A run that was interrupted is stopped too, whether or not FOLDER is served: only `fedgrade resume` takes it up then.
    """
    from server.stopping import stop_run  # noqa: PLC0415 - Flower takes a second

    click.echo(stop_run(CoordinatorFolder(root=folder)))


def _revoked_by(folder: CoordinatorFolder, notice: Path) -> SiteId:
    from server.leaving import revoke_by_notice  # noqa: PLC0415

    if notice.stat().st_size > MAX_PAPER_BYTES:
        raise DocumentRefused(f"{notice}: over {MAX_PAPER_BYTES} bytes; a leave notice is smaller")
    return revoke_by_notice(folder, notice.read_bytes(), now=datetime.now(UTC)).site


def _own(folder: CoordinatorFolder) -> str:
    return SigningKey.load(folder.key).public.fingerprint


def _taken_note_of(folder: Path, site: SiteId, *, enrolled: bool) -> str:
    """Whether the SuperLink that serves ``folder`` lets ``site`` in now, in words; waits until it has caught up."""
    from server.attached import is_served, wait_for_nodes  # noqa: PLC0415

    if not is_served(folder):
        return "; no SuperLink serves this folder now, and the next one will know"
    if not wait_for_nodes(folder, lambda nodes: (site in nodes) == enrolled):
        return "; the SuperLink has not taken note of it yet, see the log of `fedgrade serve`"
    return "; the SuperLink lets it in" if enrolled else "; the SuperLink refuses it from now on"


def _online(folder: Path) -> set[SiteId]:
    """Sites whose node is online.

    Raises:
        NotServing: no SuperLink runs.
        ControlRefused: it does not answer now.
    """
    from server.attached import attached  # noqa: PLC0415
    from server.nodes_file import read_nodes  # noqa: PLC0415

    with attached(folder) as control:
        online = control.online()
    return {site for site, node in read_nodes(folder).items() if node in online}
