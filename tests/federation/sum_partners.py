"""Partners that add up under masks: sites that can be restarted, and a wire on which all is seen and may be lost."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np

from fedgrade.federation import rounds
from fedgrade.federation import site as site_module
from fedgrade.federation.exchange import Exchange
from fedgrade.federation.messages import (
    CommitRequest,
    ContributeRequest,
    Refusal,
    Reply,
    Request,
    read_message,
    write_message,
)
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import SiteId, site_id
from tests.federation.small_federation import DISTRIBUTED, POLICY

FIVE = tuple(site_id(f"recycler-{letter}") for letter in "abcde")
SUMS = replace(POLICY, modes=("distributed",), epsilon_per_job=60.0, epsilon_limit=1000.0)


def summing(rounds=1, **aggregation):
    """A job in mode ``distributed``."""
    return replace(
        DISTRIBUTED,
        privacy=replace(DISTRIBUTED.privacy, rounds=rounds),
        aggregation=replace(DISTRIBUTED.aggregation, **aggregation),
    )


class Partners:
    """Every site of a federation, open; each can be restarted, which loses what it had in memory.

    Who has a policy of its own in ``policies`` goes by that from its next start on.
    """

    def __init__(self, federation, policy=SUMS):
        self.federation, self.policy, self.policies = federation, policy, {}
        self.sites, self._open = {}, {}
        for name in federation.site_keys:
            self._start(name)

    @classmethod
    @contextmanager
    def of(cls, federation, policy=SUMS):
        partners = cls(federation, policy)
        try:
            yield partners
        finally:
            for stack in partners._open.values():
                stack.close()

    def _start(self, name):
        self._open[name] = ExitStack()
        self.sites[name] = self._open[name].enter_context(
            self.federation.site(name, policy=self.policies.get(name, self.policy))
        )

    def restart(self, name):
        self._open[name].close()
        self._start(name)

    def answer(self, name, raw):
        return self.sites[name].answer(raw)


Meddle = Callable[[SiteId, object, Callable[[], bytes]], bytes | None]


def faithful(_site, _body, pass_on):
    return pass_on()


class Wire:
    """Carries bytes between a coordinator and ``partners``; ``meddle(site, body, pass_on)`` returns a reply or None.

    ``calls`` has the bodies of each round trip, ``heard`` every reply that came back, ``waits`` each deadline.
    """

    def __init__(self, partners: Partners, meddle: Meddle = faithful):
        self.partners, self.meddle = partners, meddle
        self.calls: list[dict[SiteId, object]] = []
        self.heard: list[tuple[SiteId, object, bytes]] = []
        self.waits: list[float] = []
        self.now: tuple[SiteId, object] | None = None

    def ask(self, requests: Mapping[SiteId, bytes], *, deadline_seconds: float) -> dict[SiteId, bytes]:
        federation = self.partners.federation
        key = federation.coordinator_key.public
        bodies = {site: read_message(raw, as_=Request, signed_by=key).document.body for site, raw in requests.items()}
        self.calls.append(bodies)
        self.waits.append(deadline_seconds)
        replies = {}
        for site, raw in requests.items():
            self.now = site, bodies[site]
            reply = self.meddle(site, bodies[site], lambda site=site, raw=raw: self.partners.answer(site, raw))
            if reply is not None:
                self.heard.append((site, bodies[site], reply))
                replies[site] = reply
        return replies

    def asked(self, kind, site=None):
        """Places of the calls with a body of this class, to ``site`` if it is named."""
        return [
            place(body)
            for call in self.calls
            for of, body in call.items()
            if isinstance(body, kind) and of == (site or next(iter(call)))
        ]

    def opened(self, site, raw):
        return read_message(raw, as_=Reply, signed_by=self.partners.federation.roster.key_of(site))

    def replies(self, kind):
        """Verified replies with a body of this class: site, request's body, opened reply."""
        opened = ((site, body, self.opened(site, raw)) for site, body, raw in self.heard)
        return [one for one in opened if isinstance(one[2].document.body, kind)]

    def refusals(self):
        return [(site, reply.document.body.code) for site, _, reply in self.replies(Refusal)]


def place(body):
    """Purpose, round and attempt of a request."""
    task = body.proposal.terms.task if isinstance(body, CommitRequest) else body
    return task.purpose, task.round_index, task.attempt


def at(body, kind, purpose, attempt=None):
    """Whether ``body`` is of this class and for this purpose; of one attempt, if it is named."""
    if not isinstance(body, kind) or not isinstance(body, CommitRequest | ContributeRequest):
        return False
    return place(body)[0] == purpose and attempt in {None, place(body)[2]}


class Noted:
    """What sites' own code computed, by place and site, and what the coordinator made of it, by place."""

    def __init__(self, patch, wire):
        self.plain: dict[tuple, np.ndarray] = {}
        self.gathered = []
        self.put_out: dict[SiteId, str] = {}
        noisy_sum, advance, put_out = site_module.noisy_sum, rounds._advance, Exchange.put_out

        def note_sum(*arguments, **named):
            total = noisy_sum(*arguments, **named)
            site, body = wire.now
            assert (*place(body), site) not in self.plain
            self.plain[(*place(body), site)] = np.array(total)
            return total

        def note_result(job, state, stage, gathered):
            self.gathered.append(((stage.purpose, stage.round_index, gathered.attempt), gathered))
            return advance(job, state, stage, gathered)

        def note_exclusion(exchange, site, why):
            self.put_out[site] = why
            put_out(exchange, site, why)

        patch.setattr(Exchange, "put_out", note_exclusion)
        patch.setattr(site_module, "noisy_sum", note_sum)
        patch.setattr(rounds, "_advance", note_result)

    def require_exact(self):
        """Every result is the plain integer sum of what the sites in it computed, in Python's own integers."""
        assert self.gathered
        for where, gathered in self.gathered:
            vectors = [self.plain[(*where, site)].tolist() for site in gathered.sites]
            assert gathered.result.tolist() == [sum(column) for column in zip(*vectors, strict=True)]


def paid(federation, site):
    """By purpose and round, how often ``site`` charged."""
    counts: dict[tuple, int] = {}
    for charge in federation.charges(site):
        key = charge.purpose, charge.round_index
        counts[key] = counts.get(key, 0) + 1
    return counts


def said_anew(federation, site, raw, change, tensors=None):
    """The reply ``raw`` of ``site`` as its own changed software would send it: signed, and about other things."""
    key = federation.site_keys[site]
    reply = read_message(raw, as_=Reply, signed_by=key.public)
    arrays = reply.tensors if tensors is None else tensors
    document = replace(reply.document, body=change(reply.document.body), tensors_digest=digest(arrays))
    return write_message(document, tensors=arrays, key=key)
