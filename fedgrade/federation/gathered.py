"""What one stage of a job brought the coordinator, however it was added up."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from fedgrade.aggregation.secure_sum.evidence import SumEvidence
from fedgrade.federation.exchange import Received
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import LedgerState


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The sites that are in ``result``, and what each of them vouches for.

    Attributes:
        result: the total [numbers] of integer releases, or the mean [parameters] of updates.
        attempt: that of the secure sum; 0 where each site was asked on its own.
        received: by site, its receipt, where its ledger stood, and the exact bytes that it sent.
        evidence: what sites signed in a secure sum.
    """

    result: npt.NDArray[Any]
    attempt: int
    received: dict[SiteId, Received]
    evidence: SumEvidence | None = None

    @property
    def sites(self) -> tuple[SiteId, ...]:
        """Who is in the result."""
        return tuple(sorted(self.received))

    @property
    def receipts(self) -> dict[SiteId, bytes]:
        """The signed ledger line of each site."""
        return {site: received.receipt for site, received in self.received.items()}

    @property
    def ledgers(self) -> dict[SiteId, LedgerState]:
        """Where the ledger of each site stood right after its receipt."""
        return {site: received.ledger for site, received in self.received.items()}

    @property
    def tensors(self) -> dict[SiteId, bytes]:
        """What each site sent, byte for byte."""
        return {site: received.tensors for site, received in self.received.items()}
