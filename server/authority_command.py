"""``fedgrade coordinator rotate-authority``: another private authority takes over, and no partner is cut off."""

from datetime import UTC, datetime
from pathlib import Path

import click

from server.coordinator_folder import CoordinatorFolder


@click.command("rotate-authority", epilog="Example: fedgrade coordinator rotate-authority federation")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--yes", is_flag=True, help="Do not ask.")
def rotate_authority(folder: Path, *, yes: bool) -> None:
    """Replace the authority by which partners know the SuperLink of FOLDER: takes the next of three steps.

    First the new one is announced in the bundle, beside the old one; when every partner has taken that bundle, the
    SuperLink is certified by the new one; then the old one is struck from the bundle. `fedgrade serve` may run all
    along: connections that stand go on, and new ones are shown the new certificate within seconds.
    """
    # Imported here: X.509 and the ledger take a moment.
    from server.authority import Rotation, Step  # noqa: PLC0415
    from server.enrolment import bring_up_to_date, read_book  # noqa: PLC0415

    own, now = CoordinatorFolder(root=folder), datetime.now(UTC)
    read_book(own)
    rotation = Rotation.of(folder / "superlink")
    step = rotation.next
    match step:
        case Step.ANNOUNCE:
            asked = "Make a new authority and announce it in a new bundle? Nothing changes for connections yet."
            due = f"Give every partner {own.bundle}. When all have taken it (`fedgrade site join`), run this again."
        case Step.SWITCH:
            asked = "Certify the SuperLink by the new authority? A partner that has not taken the bundle is cut off."
            due = "Partners need nothing. If all are online (`fedgrade roster`), run this once more."
        case Step.FINISH:
            asked = "Strike the old authority from the bundle? This ends the rotation."
            due = f"Give every partner {own.bundle}; there is no hurry. Delete the old key, superlink/former-*.key."
    if not yes:
        click.confirm(asked, abort=True)
    rotation.take(step, now=now)
    # The bundle follows from what stands there now, and so does the SuperLink's certificate.
    bring_up_to_date(own, now=now)
    click.echo(f"{step}: done. {due}")
