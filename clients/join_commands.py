"""``fedgrade site init``, ``request`` and ``join``: how a partner gets from photos to a place on the roster."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from fedgrade.cli.out_of_band import require_fingerprint
from fedgrade.trust.enrolment import MAX_PAPER_BYTES, JoinRequest

SITE_FILE = click.Path(path_type=Path, dir_okay=False)
_BACKBONE = "tf_efficientnet_lite0"
_ITEMS = click.IntRange(min=1)


class _FromHome(click.Path):
    """A path whose ``~`` is the home folder also where no shell has seen to that: at a prompt, within quotes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, checked."""
        try:
            return super().convert(Path(value).expanduser(), param, ctx)
        except RuntimeError as error:
            self.fail(f"{value}: {error}", param, ctx)


_PHOTOS = _FromHome(path_type=Path, file_okay=False, exists=True)
_MANIFEST = _FromHome(path_type=Path, dir_okay=False, exists=True)


@click.command(
    epilog="Example: fedgrade site init ~/fedgrade --site recycler-a --photos ~/photos --manifest ~/manifest.csv "
    "--declared-items 400 --grades 'intact,probably intact,probably defective,defective'"
)
@click.argument("folder", type=_FromHome(path_type=Path, file_okay=False))
@click.option("--site", help="The name you want on the roster, for life: a-z, 0-9 and hyphens.")
@click.option("--photos", type=_PHOTOS, help="Folder of the photos.")
@click.option("--manifest", type=_MANIFEST, help="CSV, one row a photo; checked.")
@click.option("--declared-items", type=_ITEMS, help="Training items that you publish; round it, it is no secret.")
@click.option("--grades", help="The labels you grade by, best to worst, between commas.")
@click.option("--lineage", help="Names the data set for life, as budgets hang on it; the site's name by default.")
@click.option("--cohort", help="Names this batch of items; the month by default.")
@click.option("--photos-per-item", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--epsilon-limit", type=float, default=8.0, show_default=True, help="Ceiling for the life of the data.")
@click.option("--epsilon-per-job", type=float, default=4.0, show_default=True, help="Ceiling for one job.")
@click.option(
    "--mode", "modes", multiple=True, default=("local",), show_default=True, help="Privacy modes; repeatable."
)
@click.option("--minimum-items", type=int, default=50, show_default=True, help="With fewer, stay out of a job.")
def init(
    folder: Path,
    *,
    site: str | None,
    photos: Path | None,
    manifest: Path | None,
    declared_items: int | None,
    grades: str | None,
    lineage: str | None,
    cohort: str | None,
    photos_per_item: int,
    epsilon_limit: float,
    epsilon_per_job: float,
    modes: tuple[str, ...],
    minimum_items: int,
) -> None:
    """Make this partner's keys, settings, policy and join request in FOLDER.

    What is not given is asked for on a terminal. Nothing is sent anywhere, and nothing is overwritten.
    """
    # Imported here: the accountant and Flower take seconds, and `fedgrade site --help` should not wait for them.
    from clients.joining import REQUEST, create_site  # noqa: PLC0415
    from clients.templates import PolicyValues, SiteValues  # noqa: PLC0415

    now = datetime.now(UTC)
    name: str = _asked(site, "--site", "Name on the roster, for life (a-z, 0-9, hyphens)")
    photo_folder: Path = _asked(photos, "--photos", "Folder of the photos", kind=_PHOTOS)
    manifest_file: Path = _asked(manifest, "--manifest", "Manifest (CSV)", kind=_MANIFEST)
    declared: int = _asked(declared_items, "--declared-items", "Training items to publish, rounded", kind=_ITEMS)
    labels: str = _asked(grades, "--grades", "Grades, best to worst, between commas")
    request = create_site(
        folder,
        SiteValues(
            site=name,
            photos=_from(folder, photo_folder),
            lineage=lineage or name,
            cohort=cohort or f"{now:%Y-%m}",
            manifest=_from(folder, manifest_file),
            declared_items=declared,
            photos_per_item=photos_per_item,
        ),
        PolicyValues(
            modes=modes,
            epsilon_limit=epsilon_limit,
            epsilon_per_job=epsilon_per_job,
            backbones=(_BACKBONE,),
            grades=tuple(label.strip() for label in labels.split(",")),
            minimum_items=minimum_items,
        ),
        now=now,
    )
    click.echo(f"Read {folder / 'policy.yaml'}: it is your last word, and no coordinator can widen it.")
    _tell(request, folder / REQUEST)


@click.command(epilog="Example: fedgrade site request site.yaml")
@click.argument("site_file", type=SITE_FILE)
@click.option(
    "--new-node-key", is_flag=True, help="Make a new connection key; the node changes over once it is enrolled."
)
def request(site_file: Path, *, new_node_key: bool) -> None:
    """Write the join request anew: after a new cohort, for one that was lost, or to change the connection key."""
    from clients.joining import REQUEST, request_to_join  # noqa: PLC0415

    made = request_to_join(site_file, now=datetime.now(UTC), new_node_key=new_node_key)
    _tell(made, site_file.parent / REQUEST)


@click.command(epilog="Example: fedgrade site join bundle.json site.yaml")
@click.argument("bundle", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("site_file", type=SITE_FILE)
@click.option("--fingerprint", help="The coordinator's, as it was told to you over another channel.")
def join(bundle: Path, site_file: Path, fingerprint: str | None) -> None:
    """Take the coordinator's signed BUNDLE: roster, authority and address. Also each later one, which says who is new.

    The first time, the coordinator's fingerprint is compared; afterwards no other coordinator's bundle is taken.
    """
    from clients.joining import join as take  # noqa: PLC0415
    from clients.settings import read_own_file  # noqa: PLC0415
    from fedgrade.trust.identity import PublicKey  # noqa: PLC0415

    def approve(key: PublicKey) -> None:
        require_fingerprint(key, given=fingerprint, whose="the coordinator")

    raw = read_own_file(bundle, what="bundle", limit=MAX_PAPER_BYTES)
    joined = take(site_file, raw, approve=approve)
    roster = joined.bundle.roster
    click.echo(
        f"bundle {joined.bundle.sequence} of coordinator {roster.coordinator.fingerprint}: {len(roster.sites)} sites, "
        f"at {joined.bundle.address}"
    )
    for what, sites in (("new", joined.arrived), ("left", joined.left)):
        for site in sites:
            click.echo(f"{what}: {site}" + (f"  {roster.sites[site].fingerprint}" if site in roster.sites else ""))
    if joined.moved:
        click.echo("The coordinator's address or authority is another one now.")
    if joined.came_back:
        click.echo(
            "This site had left. It belongs to the coordinator again: its leave notice is gone from here. If you sent "
            "it, send a new join request after it (`fedgrade site request`); to stay away, `fedgrade site leave` again."
        )
    click.echo(
        f"Start the node with `fedgrade site up {site_file}`; one that runs takes note by itself, within seconds."
    )


def _tell(request: JoinRequest, path: Path) -> None:
    click.echo(f"Send {path} to the coordinator; it holds nothing secret.")
    click.echo(f"Tell it, over another channel, the fingerprint of {request.site}: {request.key.fingerprint}")


def _asked(given: Any, option: str, question: str, *, kind: Any = click.STRING) -> Any:
    """``given``, or what the person at the terminal answers to ``question``, asked until it is of its ``kind``."""
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise click.UsageError(f"Missing option '{option}'; or run this at a terminal, where it is asked for.")
    return click.prompt(question, type=kind)


def _from(folder: Path, path: Path) -> str:
    """``path`` as ``site.yaml`` in ``folder`` writes it: relative inside the folder, absolute elsewhere."""
    whole, root = path.absolute(), folder.absolute()
    return str(whole.relative_to(root)) if whole.is_relative_to(root) else str(whole)
