"""A cohort in one process: the same sites and the same bytes, without a network. For tests, benchmarks and trials."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fedgrade.trust.identity import SiteId

Answer = Callable[[bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class InProcessCohort:
    """Sites by name, asked in parallel threads. Nothing is lost on the way, so the deadline never strikes."""

    sites: Mapping[SiteId, Answer]
    threads: int = 2

    def ask(self, requests: Mapping[SiteId, bytes], *, deadline_seconds: float) -> Mapping[SiteId, bytes]:
        """Replies of those sites that exist."""
        del deadline_seconds
        known = [site for site in requests if site in self.sites]
        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            replies = pool.map(lambda site: self.sites[site](requests[site]), known)
            return dict(zip(known, replies, strict=True))
