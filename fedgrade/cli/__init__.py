"""The command line. Every command is a few lines over a room below; the doors add theirs through entry points.

``verify``, ``report`` and ``budget`` need the base install alone: neither torch nor Flower is imported for them.
"""

import importlib
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fedgrade
from fedgrade.cli.audit import audit
from fedgrade.cli.budget import budget
from fedgrade.cli.releases import releases, verify_release
from fedgrade.errors import DocumentRefused, FedgradeError, LedgerBroken
from fedgrade.federation.verification import FederationProof, verify_federation
from fedgrade.logs import configure_logs
from fedgrade.privacy.accounting import printed
from fedgrade.trust.identity import Roster, SigningKey, read_roster
from fedgrade.trust.software import running_software

FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
FILE = click.Path(path_type=Path, dir_okay=False)

_DOORS = "fedgrade.commands"
# Where the demo keeps its exported backbone, which takes seconds to make.
_BACKBONES = Path("runs") / "cache" / "backbones"
_INTERRUPTED = 130
# A release lies in <federation>/jobs/<job>/release.
_FEDERATION_ABOVE = 2


class _WithDoors(click.Group):
    """A group that also has the commands of the installed doors, each imported only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(point.name for point in entry_points(group=_DOORS))})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if own := super().get_command(ctx, name):
            return own
        for point in entry_points(group=_DOORS, name=name):
            module, _, attribute = point.value.partition(":")
            try:
                return _command(getattr(importlib.import_module(module), attribute))
            except ModuleNotFoundError as error:
                return _not_installed(name, error.name)
        return None


@click.group(cls=_WithDoors, epilog="Example: fedgrade demo")
@click.version_option(fedgrade.__version__, prog_name="fedgrade")
@click.option("-v", "--verbose", is_flag=True, help="Say what happens underneath.")
def cli(*, verbose: bool) -> None:
    """Grade used equipment with one model that competitors train together, without pooling a photo."""
    configure_logs(logging.INFO if verbose else logging.WARNING, lines="%(levelname)s %(message)s")


cli.add_command(audit)
cli.add_command(budget)
cli.add_command(releases)
cli.add_command(verify_release)


@cli.group(epilog="Example: fedgrade keys new key.pem")
def keys() -> None:
    """Make and show the key that speaks for a site."""


@keys.command("new", epilog="Example: fedgrade keys new key.pem")
@click.argument("path", type=FILE)
def keys_new(path: Path) -> None:
    """Make an Ed25519 key in a new file that only you can read, and print its public half."""
    key = SigningKey.generate()
    key.save(path)
    click.echo(key.public.hexadecimal)


@keys.command("show", epilog="Example: fedgrade keys show key.pem")
@click.argument("path", type=FILE)
def keys_show(path: Path) -> None:
    """Print the public half of a key: what the coordinator writes on the roster."""
    click.echo(SigningKey.load(path).public.hexadecimal)


@cli.command(epilog="Example: fedgrade verify runs/demo --roster roster-from-the-contract.json")
@click.argument("folder", type=FOLDER)
@click.option("--roster", type=FILE, help="The roster you trust; without it, the folder's own is used.")
@click.option("--partial", is_flag=True, help="End well although ledgers of some participants are not here.")
def verify(folder: Path, roster: Path | None, *, partial: bool) -> None:
    """Check every ledger, receipt and release in FOLDER offline, and recompute what privacy was spent."""
    proof = verify_federation(folder, roster=_roster(roster))
    console = Console(soft_wrap=True)
    console.print(_spending_table(proof))
    for job in proof.jobs.values():
        release = f"release {job.release.digest[:16]}" if job.release else "not released"
        console.print(f"job {job.job.spec.name} {job.job.digest[:16]}: {len(job.rounds)} stages, {release}")
    for line in _software_lines(proof):
        console.print(line)
    missing = sorted({site for job in proof.jobs.values() for site in job.job.participants} - set(proof.sites))
    if missing:
        console.print(
            f"[bold]{proof.entries} entries hold as far as they go; {', '.join(missing)} took part, and the ledgers "
            "are not here: their charges are not proved.[/bold]"
        )
    else:
        console.print(f"[bold]{proof.entries} entries, every signature, chain, charge and receipt holds.[/bold]")
    for site in sorted(
        proof.roster.sites.keys() - (_roster(roster) or read_roster(folder / "roster.json")).sites.keys()
    ):
        console.print(f"{site} was revoked; whose key it had is the word of the coordinator's ledger.")
    if roster is None:
        console.print("The roster came from the folder itself; compare its keys with ones you trust, or give --roster.")
    if missing and not partial:
        raise LedgerBroken(f"{folder}: no ledger of {', '.join(missing)}; add the copies, or give --partial")


@cli.command(epilog="Example: fedgrade report runs/demo")
@click.argument("folder", type=FOLDER)
@click.option("--roster", type=FILE, help="The roster you trust; without it, the folder's own is used.")
def report(folder: Path, roster: Path | None) -> None:
    """Rebuild the HTML privacy report of FOLDER from its ledgers alone, after verifying them."""
    from fedgrade.report.privacy import write_report  # noqa: PLC0415 - matplotlib takes its time

    click.echo(write_report(folder, roster=_roster(roster), now=datetime.now(UTC)))


@cli.command(epilog="Example: fedgrade grade --model runs/demo/jobs/0123456789abcdef/release photo.png")
@click.option("--model", "release", type=FOLDER, required=True, help="Folder of a signed model release, or a bundle.")
@click.option("--roster", type=FILE, help="Roster that names the coordinator; by default the release's federation's.")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Where the exported backbone is kept.")
@click.argument("photos", type=FILE, nargs=-1, required=True)
def grade(release: Path, roster: Path | None, cache: Path | None, photos: tuple[Path, ...]) -> None:
    """Verify a model release, then grade PHOTOS: grade, confidence, and the expected cost of being wrong."""
    try:
        from fedgrade.federation.grading_desk import grade_photos  # noqa: PLC0415 - torch takes seconds
    except ModuleNotFoundError as error:
        _lacks("grade", error.name)
    trusted = _roster(roster) or read_roster(_roster_beside(release))
    graded = grade_photos(photos, release=release, roster=trusted, cache=cache or _BACKBONES)
    table = Table("photo", "grade", "confidence", "expected cost", box=None)
    for each in graded:
        style = "bold red" if each.critical else ""
        cells = (_shown(each.photo.name), _shown(each.grade), f"{each.confidence:.0%}", f"{each.expected_cost:.2f}")
        table.add_row(*cells, style=style)
    Console().print(table)
    if roster is None:
        click.echo("The roster came from beside the release; compare its keys with ones you trust, or give --roster.")


def main() -> None:
    """Run the command line; whatever is refused becomes one line and a non-zero status."""
    try:
        cli(standalone_mode=False)
    except FedgradeError as error:
        click.echo(f"fedgrade: {_printable(str(error))}", err=True)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"fedgrade: {_printable(f'{where}{error.strerror or error}')}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("fedgrade: interrupted", err=True)
        sys.exit(_INTERRUPTED)


def _command(loaded: object) -> click.Command:
    if not isinstance(loaded, click.Command):
        raise TypeError(f"entry point of {_DOORS}: {loaded!r} is no command")
    return loaded


def _not_installed(name: str, missing: str | None) -> click.Command:
    """A command that is listed, and says what it would take."""
    return click.Command(
        name,
        callback=lambda: _lacks(name, missing),
        help=f"Not installed here: needs {missing} (pip install 'fedgrade[demo]').",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )


def _lacks(name: str, module: str | None) -> None:
    raise click.ClickException(f"`fedgrade {name}` needs {module}; install it with: pip install 'fedgrade[demo]'")


def _roster(path: Path | None) -> Roster | None:
    return None if path is None else read_roster(path)


def _roster_beside(release: Path) -> Path:
    """The roster of the federation folder that ``release`` lies in: <folder>/jobs/<job>/release."""
    above = release.resolve().parents
    roster = above[_FEDERATION_ABOVE] / "roster.json" if len(above) > _FEDERATION_ABOVE else None
    if roster is None or not roster.is_file():
        raise DocumentRefused(f"release {release}: no federation's roster lies above it; give --roster")
    return roster


def _printable(text: str) -> str:
    """``text`` as one line that cannot steer a terminal; names in ledgers are whatever their writers chose."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _shown(text: str) -> str:
    """``text`` as rich shows it letter by letter."""
    return escape(_printable(text))


def _software_lines(proof: FederationProof) -> Iterator[str]:
    """What ran, by each site's own word, and whether this installation is the same."""
    here = running_software()
    ran: dict[tuple[str, str], set[str]] = {}
    for site, ledger in proof.sites.items():
        for software in ledger.software.values():
            ran.setdefault((software.fedgrade, software.source), set()).add(site)
    for (version, source), sites in ran.items():
        same = "the same as here" if source == here.source else "not the source installed here"
        yield f"ran fedgrade {_shown(version)}, source {source[:16]}, {same}: {', '.join(sorted(sites))}"


def _spending_table(proof: FederationProof) -> Table:
    table = Table("account", "epsilon spent", "ceiling", "delta", "charges", box=None, title="Privacy spent, per item")
    for site, ledger in proof.sites.items():
        for key, account in ledger.accounts.items():
            table.add_row(
                _shown(f"{site}/{key.lineage}/{key.cohort}/{key.partition}"),
                printed(account.epsilon),
                f"{float(account.dataset.epsilon_limit):.2f}",
                f"{float(account.dataset.delta):g}",
                str(len(ledger.charges_to(key))),
            )
    return table
