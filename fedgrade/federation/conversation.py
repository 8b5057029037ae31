"""The coordinator's side of one job's conversation: ask, ask again, and believe only what verifies.

Silence is absence, not an error. A site that stayed silent is asked again with the same bytes, which costs it nothing;
a site that lost its reply is asked for a further attempt, which it charges. A reply that does not verify counts as
silence and is logged.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedgrade.errors import FedgradeError, MessageRefused, RoundFailed
from fedgrade.federation.messages import (
    AdmitRequest,
    Admitted,
    ContributeRequest,
    Contribution,
    Opened,
    Refusal,
    Reply,
    Request,
    read_message,
    write_message,
)
from fedgrade.federation.payloads import read_release
from fedgrade.federation.witness import Witness
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.ledger import Entry, open_receipt
from fedgrade.trust.records import Commit, LedgerState, Purpose

logger = logging.getLogger(__name__)

RESENDS = 2


class Cohort(Protocol):
    """Whoever carries bytes to sites and back."""

    def ask(self, requests: Mapping[SiteId, bytes], *, deadline_seconds: float) -> Mapping[SiteId, bytes]:
        """Replies of those who answered in time; silence is absence, not an error."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What one stage brought: verified releases, the bytes that each was read from, and each one's receipt.

    ``ledgers`` is where the ledger of each site stood right after its receipt.
    """

    releases: dict[SiteId, npt.NDArray[Any]]
    receipts: dict[SiteId, bytes]
    ledgers: dict[SiteId, LedgerState]
    tensors: dict[SiteId, bytes]


class Conversation:
    """One job's exchanges with the sites that take part; who refused stays out."""

    def __init__(
        self, job: TrainingJob, cohort: Cohort, key: SigningKey, witness: Witness, deadline_seconds: float
    ) -> None:
        self._job = job
        self._cohort = cohort
        self._key = key
        self._witness = witness
        self._deadline_seconds = deadline_seconds
        self._active: tuple[SiteId, ...] = job.participants
        self._stood: dict[SiteId, LedgerState] = {}
        self._out: dict[SiteId, str] = {}
        self._unable: dict[SiteId, str] = {}

    def admit(self, ledger: str, *, stood: Mapping[SiteId, LedgerState]) -> None:
        """Show the sealed job to every participant; who refuses, or whose ledger was rewritten, stays out.

        Args:
            ledger: the sealed head of the coordinator's own ledger.
            stood: where the ledgers of sites stood after what they answered in this job before.

        Raises:
            RoundFailed: too few take part; names who stays out and why.
            LedgerBroken: what is kept of a site's ledger does not verify.
        """
        self._stood.update(stood)
        envelope, admitted = seal(self._job, self._key).decode(), set[SiteId]()
        for _ in range(1 + RESENDS):
            silent = {
                site: self._request(
                    site, AdmitRequest(job_envelope=envelope, seen=self._witness.seen(site), ledger=ledger)
                )
                for site in self._active
                if site not in admitted
            }
            for site, reply in self._exchange(silent).items():
                if isinstance(reply.document.body, Admitted) and self._watched(site, reply.document.body):
                    admitted.add(site)
            if admitted.issuperset(self._active):
                break
        self._out.update(self._unable)
        self._active = tuple(site for site in self._active if site in admitted)
        self._require_enough(len(admitted), what="admission")

    @property
    def active(self) -> tuple[SiteId, ...]:
        """Who was admitted and has not refused since."""
        return self._active

    def gather(self, purpose: Purpose, round_index: int, tensors: bytes, *, sites: Collection[SiteId]) -> Gathered:
        """Releases for one stage from those of ``sites`` that take part.

        Raises:
            RoundFailed: fewer than ``aggregation.minimum_sites`` answered with something that verifies.
        """
        gathered = Gathered(releases={}, receipts={}, ledgers={}, tensors={})
        attempts = dict.fromkeys(self._active, 0)
        for _ in range(1 + RESENDS):
            asked = {
                site: self._request(
                    site,
                    ContributeRequest(purpose=purpose, round_index=round_index, attempt=attempts[site]),
                    tensors=tensors,
                )
                for site in self._active
                if site in sites and site not in gathered.releases
            }
            if not asked:
                break
            for site, reply in self._exchange(asked).items():
                body = reply.document.body
                if isinstance(body, Refusal) and body.code == "spent":
                    attempts[site] += 1
                elif isinstance(body, Contribution):
                    self._accept(gathered, site, reply, body, attempts[site])
        self._require_enough(len(gathered.releases), what=f"{purpose} round {round_index}")
        return gathered

    def _exchange(self, requests: Mapping[SiteId, bytes]) -> dict[SiteId, Opened[Reply]]:
        """Verified replies to ``requests``; a refusal puts its site out of the job, unless asking again may help."""
        replies: dict[SiteId, Opened[Reply]] = {}
        for site, raw in self._cohort.ask(requests, deadline_seconds=self._deadline_seconds).items():
            try:
                reply = read_message(raw, as_=Reply, signed_by=self._witness.roster.key_of(site))
                if reply.document.site != site or reply.document.request_digest != digest(requests[site]):
                    raise MessageRefused(f"reply of {reply.document.site} answers something else")
            except (FedgradeError, KeyError) as error:
                logger.warning("site %s: reply discarded: %s", site, error)
                continue
            body = reply.document.body
            if isinstance(body, Refusal) and body.code == "ledger":
                # A full disk was nobody's decision: nothing was released, and space may be back by the next question.
                logger.warning("site %s cannot use its ledger, counted as silent: %s", site, body.reason)
                self._unable[site] = f"refused (ledger): {body.reason}"
                continue
            replies[site] = reply
            self._unable.pop(site, None)
            if isinstance(body, Refusal) and body.code != "spent":
                self._put_out(site, f"refused ({body.code}): {body.reason}")
        return replies

    def _watched(self, site: SiteId, body: Admitted) -> bool:
        """Whether the ledger of ``site`` only grew since it was seen last; if not, the site stays out."""
        try:
            self._witness.admit(site, body)
        except FedgradeError as error:
            self._put_out(site, f"stays out: {error}")
            return False
        return True

    def _put_out(self, site: SiteId, why: str) -> None:
        logger.warning("site %s %s", site, why)
        self._out[site] = why
        self._active = tuple(active for active in self._active if active != site)

    def _accept(self, gathered: Gathered, site: SiteId, reply: Opened[Reply], body: Contribution, attempt: int) -> None:
        """Keep the contribution if its receipt vouches for exactly these bytes and this place in the job.

        A site whose ledger does not go on from where it stood stays out from here on.
        """
        try:
            entry = open_receipt(body.receipt.encode(), key=self._witness.roster.key_of(site))
            _require_receipt(entry, body, job=self._job.digest, attempt=attempt, tensors=reply.tensors)
            release = read_release(reply.tensors, self._job, body.purpose, site=site)
        except FedgradeError as error:
            logger.warning("site %s: contribution discarded: %s", site, error)
            return
        try:
            state = self._witness.receive(site, body, sequence=entry.sequence, stood=self._stood.get(site))
        except FedgradeError as error:
            self._put_out(site, f"stays out: {error}")
            return
        self._stood[site] = gathered.ledgers[site] = state
        gathered.releases[site] = np.asarray(release)
        gathered.receipts[site] = body.receipt.encode()
        gathered.tensors[site] = reply.tensors

    def _request(self, site: SiteId, body: AdmitRequest | ContributeRequest, *, tensors: bytes = b"") -> bytes:
        request = Request(site=site, job=self._job.digest, body=body, tensors_digest=digest(tensors))
        return write_message(request, tensors=tensors, key=self._key)

    def _require_enough(self, answered: int, *, what: str) -> None:
        wanted = self._job.spec.aggregation.minimum_sites
        if answered < wanted:
            reasons: dict[str, list[SiteId]] = {}
            for site, why in {**self._unable, **self._out}.items():
                reasons.setdefault(why, []).append(site)
            named = "; ".join(f"{', '.join(who)} {why}" for why, who in reasons.items())
            raise RoundFailed(
                f"{what}: {answered} sites answered, aggregation.minimum_sites is {wanted}; "
                + (named or "the others stayed silent")
            )


def _require_receipt(entry: Entry, body: Contribution, *, job: str, attempt: int, tensors: bytes) -> None:
    """Return if the ledger line ``entry`` is the charge for ``tensors`` at the place that ``body`` answers for."""
    commit, place = entry.body, (job, body.purpose, body.round_index, body.attempt)
    if not isinstance(commit, Commit) or place != (commit.job, commit.purpose, commit.round_index, commit.attempt):
        raise MessageRefused("the receipt is for another place in the job")
    if commit.message_digest != digest(tensors) or body.attempt != attempt:
        raise MessageRefused("the receipt is for another release")
