"""``fedgrade publish``: a finished job becomes a bundle that others can use."""

from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from server.coordinator_folder import CoordinatorFolder

FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path, file_okay=False, exists=True)
# Where `fedgrade demo`, `run` and `grade` keep the exported backbone, which takes seconds to make.
BACKBONES = Path("runs") / "cache" / "backbones"
MEGABYTE = 1e6


@click.command(epilog="Example: fedgrade publish federation --to solar-cells-2026-11")
@click.argument("folder", type=EXISTING)
@click.argument("job", default="")
@click.option("--to", type=FOLDER, required=True, help="The new folder that becomes the bundle.")
@click.option("--licence", default="", help="What users of the model may do, in one line; stands on its card.")
@click.option("--partial", is_flag=True, help="Go on although ledgers of some participants are not here.")
@click.option("--cache", type=FOLDER, default=BACKBONES, show_default=True, help="Where the exported backbone is kept.")
def publish(folder: Path, job: str, to: Path, licence: str, cache: Path, *, partial: bool) -> None:
    """Make the release of JOB in FOLDER into a bundle: weights, ONNX, a card, receipts, and a signed list of them.

    JOB is the beginning of a job's digest, or of a release's; the newest release if left out. The whole of FOLDER is
    verified first, and the ONNX file is held against the release. The coordinator's ledger says what was published.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(
            f"{cache}: cannot be made ({error.strerror}); choose another folder", param_hint="--cache"
        ) from error
    try:
        # Imported here: onnx, and torch where the backbone is not exported yet.
        from server.publishing import Wish, publish_bundle  # noqa: PLC0415

        done = publish_bundle(
            CoordinatorFolder(root=folder),
            Wish(job=job, licence=licence, partial=partial),
            to=to,
            cache=cache,
            now=datetime.now(UTC),
            rng=np.random.default_rng(),
        )
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"`fedgrade publish` needs {error.name}; install it with: pip install 'fedgrade[coordinator,site]'"
        ) from error
    click.echo(f"{to}: release {done.release.digest[:16]} of job {done.release.name}, {done.size / MEGABYTE:.1f} MB")
    follows = f"follows release {done.release.previous[:16]}" if done.release.previous else "is the first"
    click.echo(f"It {follows} for this asset type. ONNX and release differ by at most {done.difference:.0e}.")
    click.echo(f"The ledger knows the bundle as {done.bundle}")
    click.echo(f"Partners check it with: fedgrade verify-release {to} --roster roster.json")
