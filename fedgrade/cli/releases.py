"""``fedgrade releases`` and ``verify-release``: what a coordinator published, and a bundle before it is used.

Both need the base install alone; where onnxruntime is installed too, a bundle's ONNX file is run against its release.
"""

from pathlib import Path

import click
from rich.table import Table

from fedgrade.cli.budget import plain_console, shown_name
from fedgrade.federation.bundle import OpenedBundle, open_bundle, require_receipts
from fedgrade.federation.registry import registry
from fedgrade.trust.identity import read_roster

FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
FILE = click.Path(path_type=Path, dir_okay=False)
# Where the demo keeps its exported backbone, which takes seconds to make.
BACKBONES = Path("runs") / "cache" / "backbones"
_DIGITS = 16
_MINUTE = 16  # characters of a time


@click.command(epilog="Example: fedgrade releases federation")
@click.argument("folder", type=FOLDER)
@click.option("--roster", type=FILE, help="The roster you trust; without it, the folder's own is used.")
def releases(folder: Path, roster: Path | None) -> None:
    """List every release in the coordinator's ledger of FOLDER, oldest first, and which one each follows."""
    trusted = read_roster(roster if roster is not None else folder / "roster.json")
    table = Table("published", "asset type", "job", "release", "follows", "kappa", "bundles", box=None)
    for one in registry(folder, coordinator=trusted.coordinator):
        table.add_row(
            shown_name(one.published[:_MINUTE]),
            shown_name(one.asset_type),
            f"{shown_name(one.name)} {one.job[:_DIGITS]}",
            one.digest[:_DIGITS],
            one.previous[:_DIGITS] or "none",
            f"{one.metrics.quadratic_weighted_kappa:.3f}",
            ", ".join(bundle[:_DIGITS] for bundle in one.bundles) or "none",
        )
    plain_console().print(table)
    if roster is None:
        click.echo("The roster came from the folder itself; compare its keys with ones you trust, or give --roster.")


@click.command("verify-release", epilog="Example: fedgrade verify-release bundle --roster roster.json")
@click.argument("bundle", type=FOLDER)
@click.option("--roster", type=FILE, required=True, help="The roster you trust; it names the coordinator.")
@click.option(
    "--cache", type=click.Path(path_type=Path, file_okay=False), default=BACKBONES, show_default=True,
    help="Where the exported backbone is kept.",
)  # fmt: skip
def verify_release(bundle: Path, roster: Path, cache: Path) -> None:
    """Check a published BUNDLE before it is used: signature, every file, every receipt, and its ONNX file.

    Where onnxruntime is installed, the ONNX file is run beside the release on inputs that nobody could foresee.
    """
    trusted = read_roster(roster)
    opened = open_bundle(bundle, signed_by=trusted.coordinator)
    strangers = require_receipts(opened, trusted)
    release, previous = opened.release.release, opened.index.previous
    size = sum(file.size for file in opened.index.files.values())
    click.echo(f"bundle {opened.digest}")
    click.echo(
        f"  signed by the coordinator {trusted.coordinator.fingerprint}\n"
        f"  {len(opened.index.files)} files, {size:,} bytes: each is the one that was signed for\n"
        f"release {opened.release.digest}\n"
        f"  job {shown_name(release.job.spec.name)}, asset type {shown_name(opened.index.asset_type)}, published "
        f"{shown_name(release.published)}\n"
        f"  {f'follows release {previous}' if previous else 'the first for this asset type'}\n"
        f"  {sum(map(len, opened.receipts.values())):,} receipts of {len(opened.receipts)} sites, as many as it counts"
    )
    if strangers:
        click.echo(f"  not on your roster, so that their receipts' signatures were not checked: {', '.join(strangers)}")
    click.echo(_onnx_line(opened, cache))


def _onnx_line(opened: OpenedBundle, cache: Path) -> str:
    try:
        # Imported here: onnxruntime, onnx, and torch where the backbone is not exported yet.
        import numpy as np  # noqa: PLC0415

        from fedgrade.federation.portable_release import require_equal  # noqa: PLC0415

        difference = require_equal(opened.model, opened.release, cache=cache, rng=np.random.default_rng())
    except ModuleNotFoundError as error:
        return f"model.onnx was not run: {error.name} is not installed here. Its digest holds."
    return f"model.onnx gives the release's own probabilities, to {difference:.0e}"
