"""Questions of one job and the answers that verify. Silence is absence, not an error; who refused stays out.

A reply that does not verify counts as silence and is logged.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy.typing as npt

from fedgrade.errors import FedgradeError, MessageRefused, RoundFailed, StoreUnavailable
from fedgrade.federation.messages import (
    Asked,
    Contribution,
    Opened,
    Refusal,
    RefusalCode,
    Reply,
    Request,
    Said,
    read_message,
    write_message,
)
from fedgrade.federation.progress import Absence
from fedgrade.federation.turns import Turns
from fedgrade.federation.witness import Witness
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.ledger import Entry, open_receipt
from fedgrade.trust.records import Commit, LedgerState

logger = logging.getLogger(__name__)

# Within this time whoever waits for a site notices that it was revoked.
_LOOK_SECONDS = 1.0
_REVOKED = "was revoked"
# Refusals after which the same site may answer the next question.
PASSING: frozenset[RefusalCode] = frozenset({"spent", "attempt"})
_NOT_NOW: frozenset[RefusalCode] = frozenset({"ledger", "waiting"})


class Cohort(Protocol):
    """Whoever carries bytes to sites and back."""

    def ask(self, requests: Mapping[SiteId, bytes], *, deadline_seconds: float) -> Mapping[SiteId, bytes]:
        """Replies of those who answered in time; silence is absence, not an error."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """One site's contribution: what it released, its receipt, and where its ledger stood right after that."""

    release: npt.NDArray[Any]
    receipt: bytes
    ledger: LedgerState
    tensors: bytes


Hear = Callable[[SiteId, str], None]


def unheard(_site: SiteId, _words: str) -> None:
    """Where nobody wants to hear of refusals."""


Watch = Callable[[Collection[SiteId]], None]


def unwatched(_awaited: Collection[SiteId]) -> None:
    """Where nobody wants to see who is waited for."""


Revoked = Callable[[], AbstractSet[SiteId]]


def nobody_revoked() -> AbstractSet[SiteId]:
    """Where nobody keeps a book of who is enrolled."""
    return frozenset()


class Exchange:
    """Who of a job's participants takes part, and what they say."""

    def __init__(
        self,
        job: TrainingJob,
        cohort: Cohort,
        key: SigningKey,
        witness: Witness,
        deadline_seconds: float,
        *,
        hear: Hear = unheard,
        watch: Watch = unwatched,
        revoked: Revoked = nobody_revoked,
    ) -> None:
        """Nothing is asked yet.

        Args:
            job: about which.
            cohort: carries the bytes.
            key: the coordinator's.
            witness: what was seen of sites' ledgers.
            deadline_seconds: for one stage.
            hear: told in words whenever a site refuses, or is put out.
            watch: told every second, in pauses between questions, who is waited for.
            revoked: says who was revoked by now.
        """
        self.job = job
        self.witness = witness
        self.deadline_seconds = deadline_seconds
        self.active: tuple[SiteId, ...] = job.participants
        self._cohort = cohort
        self._key = key
        self._stood: dict[SiteId, LedgerState] = {}
        self._out: dict[SiteId, str] = {}
        self.unable: dict[SiteId, str] = {}
        self.waiting: set[SiteId] = set()
        self._hear = hear
        self._watch = watch
        self._revoked = revoked
        # In the stage that is on.
        self._asked: set[SiteId] = set()
        self._refusing: set[SiteId] = set()

    def begin_stage(self) -> None:
        """Another stage begins: what was asked and refused before is not of it."""
        self._asked, self._refusing = set(), set()

    def absences(self, answered: Collection[SiteId]) -> dict[SiteId, Absence]:
        """Why each participant that is not among ``answered`` is missing from the stage that is on."""
        return {site: self._absence(site) for site in self.job.participants if site not in answered}

    def remember(self, stood: Mapping[SiteId, LedgerState]) -> None:
        """Take note where the ledgers of sites stood after what they answered in this job before."""
        self._stood.update(stood)

    def ask(
        self,
        bodies: Mapping[SiteId, Asked],
        *,
        tensors: bytes = b"",
        deadline_seconds: float | None = None,
        passing: Collection[RefusalCode] = PASSING,
    ) -> dict[SiteId, Opened[Reply]]:
        """Verified replies to ``bodies``; a refusal puts its site out of the job, unless its code is ``passing``."""
        self._strike_off()
        requests = {site: self._request(site, bodies[site], tensors) for site in bodies if site in self.active}
        self._asked.update(requests)
        replies: dict[SiteId, Opened[Reply]] = {}
        deadline = self.deadline_seconds if deadline_seconds is None else deadline_seconds
        for site, raw in self._cohort.ask(requests, deadline_seconds=deadline).items():
            try:
                reply = read_message(raw, as_=Reply, signed_by=self.witness.roster.key_of(site))
                if reply.document.site != site or reply.document.request_digest != digest(requests[site]):
                    raise MessageRefused(f"reply of {reply.document.site} answers something else")
            except (FedgradeError, KeyError) as error:
                logger.warning("site %s: reply discarded: %s", site, error)
                continue
            body = reply.document.body
            self.waiting.discard(site)
            self._note(site, body)
            if isinstance(body, Refusal) and body.code in _NOT_NOW:
                if body.code == "waiting":
                    self.waiting.add(site)
                # Nobody's decision about the job, such as a full disk: nothing was released, and asking later may help.
                logger.warning("site %s: not now (%s), counted as silent: %s", site, body.code, body.reason)
                self.unable[site] = _words(body)
                continue
            replies[site] = reply
            self.unable.pop(site, None)
            if isinstance(body, Refusal) and body.code not in passing:
                self.put_out(site, _words(body))
        return replies

    def received(
        self, site: SiteId, reply: Opened[Reply], *, attempt: int, read: Callable[[bytes], npt.NDArray[Any]]
    ) -> Received | None:
        """The contribution in ``reply`` if its receipt vouches for exactly these bytes and this place in the job.

        A site whose ledger does not go on from where it stood stays out from here on.
        """
        body = reply.document.body
        if not isinstance(body, Contribution):
            return None
        try:
            entry = open_receipt(body.receipt.encode(), key=self.witness.roster.key_of(site))
            _require_receipt(entry, body, job=self.job.digest, attempt=attempt, tensors=reply.tensors)
            release = read(reply.tensors)
        except FedgradeError as error:
            logger.warning("site %s: contribution discarded: %s", site, error)
            return None
        try:
            state = self.witness.receive(site, body, sequence=entry.sequence, stood=self._stood.get(site))
        except StoreUnavailable:
            # Our own fault, and no site is put out for it.
            raise
        except FedgradeError as error:
            self.put_out(site, f"stays out: {error}")
            return None
        self._stood[site] = state
        return Received(release=release, receipt=body.receipt.encode(), ledger=state, tensors=reply.tensors)

    def put_out(self, site: SiteId, why: str) -> None:
        """Ask ``site`` nothing more in this job."""
        logger.warning("site %s %s", site, why)
        self._hear(site, why)
        self._out[site] = why
        self.active = tuple(active for active in self.active if active != site)

    def keep(self, admitted: set[SiteId]) -> None:
        """Go on with ``admitted`` alone."""
        self._out.update(self.unable)
        self.active = tuple(site for site in self.active if site in admitted)

    def require_enough(
        self, answered: Collection[SiteId], *, what: str, missing: Mapping[SiteId, str] = MappingProxyType({})
    ) -> None:
        """Return if as many sites answered as the job asks for; ``missing`` says why others did not.

        Raises:
            RoundFailed: names everybody else, and why; also that nothing helps, where too many were revoked.
        """
        wanted = self.job.spec.aggregation.minimum_sites
        if len(answered) >= wanted:
            return
        self._strike_off()
        known = {**missing, **self.unable, **self._out}
        reasons: dict[str, list[SiteId]] = {}
        for site in self.job.participants:
            if site not in answered:
                silence = "did not answer" if site in self._asked else "was not asked, because it had been silent"
                reasons.setdefault(known.get(site, silence), []).append(site)
        named = "; ".join(f"{', '.join(who)} {why}" for why, who in reasons.items())
        lost = ""
        if len(self.job.participants) - len(self._revoked() & set(self.job.participants)) < wanted:
            lost = "; without who was revoked this job cannot go on"
        raise RoundFailed(
            f"{what}: {len(answered)} sites answered, aggregation.minimum_sites is {wanted}; {named}{lost}"
        )

    def _absence(self, site: SiteId) -> Absence:
        if site in self._refusing:
            return "refused"
        if site not in self.active:
            return "out"
        return "silent" if site in self._asked else "resting"

    def _note(self, site: SiteId, body: Said) -> None:
        """Take note of a refusal, for whoever watches."""
        if not isinstance(body, Refusal):
            self._refusing.discard(site)
            return
        self._refusing.add(site)
        if body.code not in PASSING:
            self._hear(site, _words(body))

    def asks_again(
        self,
        turns: Turns,
        asked: Collection[SiteId],
        replies: Collection[SiteId],
        *,
        company: Collection[SiteId],
        at_least: int,
    ) -> bool:
        """Whether to ask the silent of ``asked`` once more, after a pause where ``company`` without them is too few.

        Who is offline, or paused, is known at once, and a question to it costs no time: three in a row would end the
        job while a site is being started again. It is asked as long as the patience lasts, more and more seldom.
        """
        turns.over()
        silent = self._silent(asked, replies)
        if self._needs(silent, company, at_least) and (pause := turns.pause_seconds()) > 0:
            end = time.monotonic() + pause
            while self._needs(silent, company, at_least) and (left := end - time.monotonic()) > 0:
                self._watch(silent)
                time.sleep(min(left, _LOOK_SECONDS))
                self._strike_off()
                silent = self._silent(asked, replies)
            return True
        return turns.left

    def _silent(self, asked: Collection[SiteId], replies: Collection[SiteId]) -> list[SiteId]:
        """Those of ``asked`` of whom nothing was heard."""
        return [site for site in asked if site in self.active and site not in replies and site not in self.waiting]

    def _needs(self, silent: Collection[SiteId], company: Collection[SiteId], at_least: int) -> bool:
        """Whether ``company`` is ``at_least`` that many with ``silent``, and fewer without."""
        here = sum(site in self.active for site in company)
        return bool(silent) and here - len(silent) < at_least <= here

    def _strike_off(self) -> None:
        """Whoever was revoked meanwhile is out: a pause for it would be for nothing."""
        gone = self._revoked()
        for site in [site for site in self.active if site in gone]:
            self.put_out(site, _REVOKED)

    def _request(self, site: SiteId, body: Asked, tensors: bytes) -> bytes:
        request = Request(site=site, job=self.job.digest, body=body, tensors_digest=digest(tensors))
        return write_message(request, tensors=tensors, key=self._key)


def _words(refusal: Refusal) -> str:
    return f"refused ({refusal.code}): {refusal.reason}"


def _require_receipt(entry: Entry, body: Contribution, *, job: str, attempt: int, tensors: bytes) -> None:
    """Return if the ledger line ``entry`` is the charge for ``tensors`` at the place that ``body`` answers for."""
    commit, place = entry.body, (job, body.purpose, body.round_index, body.attempt)
    if not isinstance(commit, Commit) or place != (commit.job, commit.purpose, commit.round_index, commit.attempt):
        raise MessageRefused("the receipt is for another place in the job")
    if commit.message_digest != digest(tensors) or body.attempt != attempt:
        raise MessageRefused("the receipt is for another release")
