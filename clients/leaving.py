"""How a site leaves: a signed notice beside its files, which the coordinator is given and the node obeys.

Keys, ledger and budgets stay: what was spent is spent, and the name belongs to the key for life. Needs no torch.
"""

from datetime import datetime
from pathlib import Path
from typing import Final

from clients.settings import SiteFolder, read_own_file
from fedgrade.errors import DocumentRefused
from fedgrade.federation.store import write_durably
from fedgrade.trust.enrolment import MAX_PAPER_BYTES, LeaveNotice, read_notice, roster_digest, utc_text, write_notice
from fedgrade.trust.identity import SigningKey, read_roster

NOTICE: Final = "leave-notice.json"


def leave(site: SiteFolder, *, now: datetime) -> LeaveNotice:
    """Write ``leave-notice.json`` beside the site's settings; the notice. From here on its node does not start.

    Raises:
        DocumentRefused: the site has no coordinator, or left it already.
    """
    require_not_left(site)
    roster_file = site.path(site.settings.roster)
    if not roster_file.exists():
        raise DocumentRefused(f"site {site.settings.site}: has no coordinator that it could leave")
    key = SigningKey.load(site.path(site.settings.key))
    notice = LeaveNotice(
        site=site.settings.site, key=key.public, roster=roster_digest(read_roster(roster_file)), made=utc_text(now)
    )
    write_durably(notice_file(site), write_notice(notice, key))
    return notice


def require_not_left(site: SiteFolder) -> None:
    """Return if ``site`` belongs to its coordinator still, or again.

    Raises:
        DocumentRefused: it left.
    """
    path = notice_file(site)
    if path.exists():
        made = read_notice(read_own_file(path, what="leave notice", limit=MAX_PAPER_BYTES), what=f"{path}").made
        raise DocumentRefused(
            f"site {site.settings.site}: left its coordinator on {made[:10]}; to come back, take a bundle with "
            "`fedgrade site join` that names it"
        )


def take_back(site: SiteFolder) -> bool:
    """Let ``site`` belong to a coordinator; whether it had left."""
    had_left = notice_file(site).exists()
    notice_file(site).unlink(missing_ok=True)
    return had_left


def notice_file(site: SiteFolder) -> Path:
    """Where the notice lies."""
    return site.path(NOTICE)
