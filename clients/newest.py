"""What a partner's files say now: a bundle that `fedgrade site join` took counts while the node runs, like a policy.

A node looks at the files' dates before each poll and each request, and reads them only when those changed. Needs no
torch.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from clients.gate import Answer
from clients.link import NodeLink, version
from clients.settings import SiteFolder, read_site
from fedgrade.errors import FedgradeError, MessageRefused
from fedgrade.trust.identity import Roster, read_roster

logger = logging.getLogger(__name__)


class NewestLink:
    """How the node reaches its coordinator, as ``site.yaml`` says now.

    Raises:
        DocumentRefused: it cannot be read, or says nothing; later, the link stays what it was until it can.
    """

    def __init__(self, site_file: Path) -> None:
        self._site_file = site_file
        self._seen = version(site_file)
        self._link = read_site(site_file).link

    def now(self) -> NodeLink:
        """The link."""
        seen = version(self._site_file)
        if seen != self._seen:
            self._seen = seen
            try:
                self._link = read_site(self._site_file).link
            except FedgradeError as error:
                # Its owner may be editing it.
                logger.warning("the link stays what it was: %s", error)
        return self._link


def by_newest_roster(site: SiteFolder, take: Callable[[Roster], None], answer: Answer) -> Answer:
    """``answer``, before which ``take`` is given the roster: for the first request, and whenever its file changed.

    As with a policy, while it cannot be read or taken nothing is answered.
    """
    path = site.path(site.settings.roster)
    # For the first request too: to open a site takes seconds, in which a newer bundle may have been taken.
    seen: list[tuple[int, int, int] | None] = [None]

    def answered(request: bytes) -> bytes:
        now = version(path)
        if now != seen[0]:
            try:
                take(read_roster(path))
            except FedgradeError as error:
                logger.error("nothing is answered until the roster can be taken: %s", error)  # noqa: TRY400 -- a line
                raise MessageRefused("this site's roster cannot be taken; its own operator can see why") from error
            if seen[0] is not None:
                logger.info("roster %s: taken", path)
            seen[0] = now
        return answer(request)

    return answered
