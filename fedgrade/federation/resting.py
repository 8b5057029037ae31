"""Sites that vanished, and for how many stages the others go on without waiting for them."""

import logging
from collections.abc import Collection

from fedgrade.trust.identity import SiteId

logger = logging.getLogger(__name__)

_LONGEST_REST = 16  # stages
# A site whose absence others paid for stays away longer than one that nobody paid for.
_COSTLY_REST, _FREE_REST = 4, 1


class Resting:
    """Who is left alone, stage by stage: the more often a site vanishes, the longer, up to 16 stages."""

    def __init__(self) -> None:
        self._stage = 0
        # Until which stage a site is left alone, and for how many stages that was.
        self._until: dict[SiteId, tuple[int, int]] = {}

    def next_stage(self) -> None:
        """Another stage begins."""
        self._stage += 1

    def awake(self, sites: Collection[SiteId], *, at_least: int) -> tuple[SiteId, ...]:
        """Those of ``sites`` that were there lately; all of them where fewer than ``at_least`` were."""
        awake = tuple(site for site in sites if self._until.get(site, (0, 0))[0] < self._stage)
        return awake if len(awake) >= at_least else tuple(sites)

    def vanished(self, site: SiteId, why: str, *, costly: bool = False) -> None:
        """Leave ``site`` alone for a while; the longer the more often, and the more if it is ``costly`` to others."""
        first, factor = (_COSTLY_REST, _COSTLY_REST) if costly else (_FREE_REST, 2)
        stages = min(_LONGEST_REST, max(first, factor * self._until.get(site, (0, 0))[1]))
        self._until[site] = self._stage + stages, stages
        logger.warning("site %s %s; the next %d stages go on without it", site, why, stages)

    def back(self, site: SiteId) -> None:
        """``site`` answered: nothing is held against it any more."""
        self._until.pop(site, None)
