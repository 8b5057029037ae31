"""The coordinator's side of one job's conversation: admission, then one stage after another, and believe what verifies.

A site that stayed silent is asked again with the same bytes, which costs it nothing; a site that lost its reply is
asked for a further attempt, which it charges. How a secure sum is gathered: fedgrade/federation/sum_conversation.py.
"""

import time
from collections.abc import Collection, Mapping
from functools import partial

from fedgrade.aggregation.mean import mean_of_updates, sum_of_releases
from fedgrade.aggregation.secure_sum.signed import open_share_key
from fedgrade.errors import FedgradeError, StoreUnavailable
from fedgrade.federation.exchange import Exchange, Received
from fedgrade.federation.gathered import Gathered
from fedgrade.federation.messages import AdmitRequest, Admitted, ContributeRequest, Refusal
from fedgrade.federation.payloads import read_release
from fedgrade.federation.resting import Resting
from fedgrade.federation.store import RunStore
from fedgrade.federation.sum_conversation import SumConversation
from fedgrade.federation.sum_task import sums
from fedgrade.federation.turns import RESENDS, Turns
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.records import LedgerState, PoissonGaussian, Purpose

_ASK_AGAIN_SECONDS = 5.0


class Conversation:
    """One job's exchanges with the sites that take part; who refused stays out."""

    def __init__(self, exchange: Exchange, *, key: SigningKey, ledger: str, store: RunStore) -> None:
        """Nothing is asked yet.

        Args:
            exchange: with whom, about which job.
            key: the coordinator's, to seal the job with.
            ledger: the sealed head of the coordinator's own ledger.
            store: where attempts at secure sums are kept.
        """
        self._exchange = exchange
        self._envelope = seal(exchange.job, key).decode()
        self._ledger = ledger
        self._share_keys: dict[SiteId, bytes] = {}
        self._evaluating: set[SiteId] = set()
        self._resting = Resting()
        self._sums = SumConversation(exchange, store=store, share_keys=self._share_keys, admit=self._admitted)

    def admit(self, *, stood: Mapping[SiteId, LedgerState], patience_seconds: float = 0.0) -> None:
        """Show the sealed job to every participant; who refuses, or whose ledger was rewritten, stays out.

        Args:
            stood: where the ledgers of sites stood after what they answered in this job before.
            patience_seconds: how long sites are waited for that say that they wait themselves, for a person or an hour.

        Raises:
            RoundFailed: too few take part; names who stays out and why.
            LedgerBroken: what is kept of a site's ledger does not verify.
        """
        self._exchange.remember(stood)
        admitted = self._admitted(self._exchange.active)
        end = time.monotonic() + patience_seconds
        while self._exchange.waiting and (left := end - time.monotonic()) > 0:
            time.sleep(min(_ASK_AGAIN_SECONDS, left))
            admitted |= self._admitted(frozenset(self._exchange.waiting))
        self._exchange.keep(admitted)
        self._exchange.require_enough(admitted, what="admission")
        # Nobody should pay for the training of a model that cannot be measured in the end.
        shy = dict.fromkeys(sorted(admitted - self._evaluating), "does not evaluate, by its policy.releases")
        self._exchange.require_enough(admitted & self._evaluating, what="evaluation", missing=shy)

    def gather(self, purpose: Purpose, round_index: int, tensors: bytes) -> Gathered:
        """One stage's result from the sites that take part, who are shown the arrays ``tensors``.

        Raises:
            RoundFailed: fewer than ``aggregation.minimum_sites`` answered with something that verifies.
        """
        self._exchange.begin_stage()
        if purpose == "evaluate":
            self._exchange.keep(self._evaluating)
        if sums(self._exchange.job):
            return self._sums.gather(purpose, round_index, tensors)
        received = self._each(purpose, round_index, tensors)
        self._exchange.require_enough(received, what=f"{purpose} round {round_index}")
        job = self._exchange.job
        if isinstance(job.plan.mechanism(purpose), PoissonGaussian):
            result = mean_of_updates([(one.release, job.declared_items[site]) for site, one in received.items()])
            return Gathered(result=result, attempt=0, received=received)
        total = sum_of_releases([one.release for one in received.values()])
        return Gathered(result=total, attempt=0, received=received)

    def _admitted(self, sites: Collection[SiteId]) -> set[SiteId]:
        """Those of ``sites`` that take part."""
        admitted = set[SiteId]()
        patience = self._exchange.deadline_seconds
        turns, asking = Turns(patience, each_seconds=patience), True
        while asking:
            silent = {
                site: AdmitRequest(
                    job_envelope=self._envelope, seen=self._exchange.witness.seen(site), ledger=self._ledger
                )
                for site in self._exchange.active
                if site in sites and site not in admitted
            }
            if not silent:
                break
            # A turn of its own length: a site that is slow to let itself be shown a job has it all, each time.
            replies = self._exchange.ask(silent)
            for site, reply in replies.items():
                body = reply.document.body
                if isinstance(body, Admitted) and self._watched(site, body) and self._keyed(site, body):
                    admitted.add(site)
                    (self._evaluating.add if body.evaluates else self._evaluating.discard)(site)
            asking = self._exchange.asks_again(
                turns,
                silent,
                replies,
                company=self._exchange.active,
                at_least=self._exchange.job.spec.aggregation.minimum_sites,
            )
        return admitted

    def _watched(self, site: SiteId, body: Admitted) -> bool:
        """Whether the ledger of ``site`` only grew since it was seen last; if not, the site stays out."""
        try:
            self._exchange.witness.admit(site, body)
        except StoreUnavailable:
            # Our own fault, and no site is put out for it.
            raise
        except FedgradeError as error:
            self._exchange.put_out(site, f"stays out: {error}")
            return False
        return True

    def _keyed(self, site: SiteId, body: Admitted) -> bool:
        """Whether ``site`` announced a key that others can encrypt shares under, if they will; if not, it stays out."""
        job = self._exchange.job
        if job.spec.aggregation.tolerate_dropouts:
            raw = body.share_key.encode()
            try:
                open_share_key(raw, job=job.digest, site=site, roster=self._exchange.witness.roster)
            except FedgradeError as error:
                self._exchange.put_out(site, f"stays out: {error}")
                return False
            self._share_keys[site] = raw
        return True

    def _each(self, purpose: Purpose, round_index: int, tensors: bytes) -> dict[SiteId, Received]:
        """What sites release each on its own, an attempt further where a reply was lost; within the stage's deadline.

        Whoever stays silent all the time is not waited for in the next stages.
        """
        self._resting.next_stage()
        received: dict[SiteId, Received] = {}
        minimum = self._exchange.job.spec.aggregation.minimum_sites
        awake = self._resting.awake(self._exchange.active, at_least=minimum)
        attempts = dict.fromkeys(awake, 0)
        patience = self._exchange.deadline_seconds
        turns, asking = Turns(patience, each_seconds=patience / (1 + RESENDS)), True
        while asking:
            asked = {
                site: ContributeRequest(purpose=purpose, round_index=round_index, attempt=attempts[site])
                for site in awake
                # Each attempt may be charged.
                if site in self._exchange.active and site not in received and attempts[site] <= RESENDS
            }
            if not asked:
                break
            replies = self._exchange.ask(asked, tensors=tensors, deadline_seconds=turns.seconds)
            for site, reply in replies.items():
                body = reply.document.body
                if isinstance(body, Refusal) and body.code == "spent":
                    attempts[site] += 1
                    continue
                read = partial(read_release, job=self._exchange.job, purpose=purpose, site=site)
                if one := self._exchange.received(site, reply, attempt=attempts[site], read=read):
                    received[site] = one
                    self._resting.back(site)
            if len(received) < minimum:
                # Whoever rested may be back, where those who were asked are too few.
                awake = self._exchange.active
                attempts = {**dict.fromkeys(awake, 0), **attempts}
            # What was lost is charged anew, however late it is heard of.
            lost = any(0 < attempts[site] <= RESENDS for site in replies if site not in received)
            asking = self._exchange.asks_again(turns, asked, replies, company=awake, at_least=minimum) or lost
        for site in awake:
            # Whoever says that it cannot just now costs no time, and is asked again in every stage.
            if site in self._exchange.active and site not in received and site not in self._exchange.unable:
                self._resting.vanished(site, "gave no answer in time")
        return received
