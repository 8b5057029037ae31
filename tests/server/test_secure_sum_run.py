"""Secure sums over the real transport: SuperLink, TLS, signed requests, resident nodes. Who listens learns nothing.

The test holds the run's Grid itself, so that it can be any coordinator. Noise is switched off: what hides an update
here is its masks alone. A node is a thread of the test, or where one has to die, a process.
"""

import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from clients.node import LinkPhase
from clients.node_key import create_node_key
from fedgrade.aggregation.secure_sum import site as sum_site
from fedgrade.aggregation.secure_sum.documents import SumCommitment, SumSurvivors, SumVotes, transcript_of
from fedgrade.federation import site as site_module
from fedgrade.federation.messages import (
    CommitRequest,
    ContributeRequest,
    Contribution,
    Reply,
    Request,
    RevealRequest,
    Voted,
    VoteRequest,
    read_message,
)
from fedgrade.federation.payloads import read_masked
from fedgrade.federation.rounds import Coordinator, run_job
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.envelope import open_sealed, seal
from server.deployment import Deployment
from server.grid_cohort import GridCohort
from tests.federation import lying_coordinator
from tests.federation.small_federation import SmallFederation, calibrate_once, zeros
from tests.federation.sum_partners import FIVE, Partners, at, place, summing
from tests.server.test_deployment import Node, admin, runtime_client

pytestmark = pytest.mark.flower

FOUR = FIVE[:4]
ALICE, BOB, CAROL, DAVE = FOUR
PATIENCE_SECONDS = 60.0
# Of a stage: each of two phases is asked for three times, so that a dead site is waited for half as long.
DEADLINE_SECONDS = 12.0
# An honest run fails once in many millions.
SIGMAS = 6.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    federation = SmallFederation.create(tmp_path_factory.mktemp("sums") / "federation", names=FOUR)
    for site in FOUR:
        create_node_key(federation.folder(site) / "node_key")
        federation.site_keys[site].save(federation.folder(site) / "key.pem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", zeros)
        patch.setattr("fedgrade.job.calibrate", calibrate_once)
        yield federation


@pytest.fixture(scope="module")
def deployment(federation):
    with Deployment(federation.root) as deployment:
        # The test takes the run's task itself.
        deployment.process("superexec").send_signal(signal.SIGSTOP)
        for site in FOUR:
            deployment.enrol(site, federation.folder(site) / "node_key.pub")
        yield deployment
        deployment.process("superexec").send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def grid(deployment):
    deployment.submit()
    with runtime_client(deployment, deployment._secret.read_bytes()) as client:
        task = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
    grid = HttpGrid(admin(deployment), root_certificates=deployment.admin_authority.read_bytes(), token=task.token)
    given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (
        given.run.run_id,
        given.context.node_id,
        given.task_id,
    )
    grid.set_run(Run.create_empty(given.run.run_id))
    heart = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    heart.start()
    yield grid
    heart.stop()
    grid.close()


class Online:
    """The four sites on the link, and what their own code computed: by place and site, the plain vector."""

    def __init__(self, federation, deployment, partners):
        self.partners, self.plain, self._thread = partners, {}, threading.local()
        self.nodes = {site: Node(deployment, federation.folder(site) / "node_key", self._answer(site)) for site in FOUR}
        for node in self.nodes.values():
            node.wait_for(LinkPhase.ONLINE)

    def _answer(self, site):
        def answer(raw):
            self._thread.site = site
            return self.partners.answer(site, raw)

        return answer

    def note_plain(self, patch):
        noisy_sum = site_module.noisy_sum

        def noted(job, purpose, head, *, rows):
            total = noisy_sum(job, purpose, head, rows=rows)
            self.plain[purpose, self._thread.site] = np.array(total)
            return total

        patch.setattr(site_module, "noisy_sum", noted)

    def leave(self, site):
        self.nodes.pop(site).end()
        self.partners._open[site].close()


@pytest.fixture(scope="module")
def sites(federation, deployment):
    with Partners.of(federation) as partners:
        online = Online(federation, deployment, partners)
        yield online
        for node in online.nodes.values():
            node.end()


class Carried:
    """A cohort on the Grid that keeps every byte that comes back; ``before(bodies)`` is called before each ask."""

    def __init__(self, grid, deployment, federation, before=lambda _bodies: None):
        self.federation, self.before = federation, before
        self.inner = GridCohort(grid, deployment._nodes)
        self.bodies, self.heard, self.waits = [], [], []

    def ask(self, requests, *, deadline_seconds):
        key = self.federation.coordinator_key.public
        bodies = {site: read_message(raw, as_=Request, signed_by=key).document.body for site, raw in requests.items()}
        self.before(bodies)
        replies = self.inner.ask(requests, deadline_seconds=deadline_seconds)
        self.bodies.append(bodies)
        self.waits.append(deadline_seconds)
        self.heard += [(site, bodies[site], raw) for site, raw in replies.items()]
        return replies

    def answer(self, site, raw):
        return self.inner.ask({site: raw}, deadline_seconds=PATIENCE_SECONDS)[site]


def run(federation, job, cohort):
    coordinator = Coordinator(
        key=federation.coordinator_key,
        witness=federation.witness(),
        clock=federation.clock,
        report=lambda _: None,
        deadline_seconds=DEADLINE_SECONDS,
    )
    with federation.log() as log:
        run_job(job, cohort, coordinator=coordinator, store=federation.store(job), log=log)


def captured_vectors(cohort, job):
    """What came over the wire as vectors: purpose, site, the words themselves."""
    for site, body, raw in cohort.heard:
        reply = read_message(raw, as_=Reply, signed_by=cohort.federation.roster.key_of(site))
        if isinstance(reply.document.body, Contribution):
            yield body.purpose, site, read_masked(reply.tensors, job, body.purpose)


def correlation(one, other):
    return abs(np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1])


def listened(federation, deployment, grid, sites, nonce):
    """A job, every byte of it captured, and the plain vectors that nobody but each site may know."""
    job = federation.job(summing(minimum_sites=3), nonce=nonce)
    cohort = Carried(grid, deployment, federation)
    with pytest.MonkeyPatch.context() as patch:
        sites.note_plain(patch)
        run(federation, job, cohort)
    verify_federation(federation.root, roster=federation.roster)
    captured = list(captured_vectors(cohort, job))
    assert {(purpose, site) for purpose, site, _ in captured} == set(sites.plain)
    return cohort, captured


def test_captured_traffic_without_noise_does_not_correlate_with_any_update(federation, deployment, grid, sites):
    """Under masks that are uniform and independent of the updates, Pearson's r of a captured vector and an update of
    the same N numbers has mean 0 and variance 1 / (N - 1) (over permutations exactly so); |r| stays below six of that.
    """
    cohort, captured = listened(federation, deployment, grid, sites, "masked")
    compared = 0
    for purpose, _, vector in captured:
        for (of, _), update in sites.plain.items():
            # In the evaluation the nine counts are too few to say anything; the others have over a thousand numbers.
            if of == purpose != "evaluate":
                assert correlation(vector, update) < SIGMAS / np.sqrt(vector.size - 1)
                compared += 1
    assert compared == 2 * len(FOUR) ** 2
    everything = b"".join(raw for _, _, raw in cohort.heard)
    # Eight numbers in a row of any update, at any place in any reply.
    rows = [
        update.tobytes()[start : start + 64] for update in sites.plain.values() for start in (0, 8 * update.size // 2)
    ]
    assert not any(row in everything for row in rows if any(row))


def test_captured_traffic_whose_masks_were_left_out_is_the_updates(federation, deployment, grid, sites, monkeypatch):
    """The same listener, the same job, and one mutant in the sites: masks are not applied. The total is no other."""
    monkeypatch.setattr(sum_site, "apply_masks", lambda vector, _masks: vector.copy())
    cohort, captured = listened(federation, deployment, grid, sites, "unmasked")
    for purpose, site, vector in captured:
        np.testing.assert_array_equal(vector, sites.plain[purpose, site])
        assert correlation(vector, sites.plain[purpose, site]) > 1 - 1e-9
    everything = b"".join(raw for _, _, raw in cohort.heard)
    assert all(update.tobytes() in everything for update in sites.plain.values())


@pytest.fixture
def liar(federation, deployment, grid, sites):
    """A coordinator that asks over the wire for whatever it likes; an attempt of four, of which one may vanish."""
    del sites
    carried = Carried(grid, deployment, federation)
    return lambda nonce: lying_coordinator.Coordinator(
        carried, replace(lying_coordinator.RECOVERING, name=nonce), participants=FOUR
    )


def test_over_the_wire_a_swapped_key_two_sets_and_a_replayed_round_are_refused(liar, federation):
    coordinator = liar("keys")
    first = coordinator.proposal(FOUR)
    honest = coordinator.committed(first)
    # Two sites are shown different sets in one attempt: neither signs both, and nobody's signature fits the other's.
    other = coordinator.proposal(FOUR[:3])
    coordinator.refused(ALICE, CommitRequest(proposal=other), "attempt", "was begun before")
    bob = open_sealed(honest.envelopes[BOB].encode(), as_=SumCommitment, signed_by=federation.roster.key_of(BOB))
    for swapped, code, reason in (
        (seal(bob, federation.coordinator_key).decode(), "malformed", "signed by key"),
        (honest.envelopes[CAROL], "malformed", "signed by key"),
    ):
        body = coordinator.contribution(first, replace(honest, envelopes={**honest.envelopes, BOB: swapped}))
        coordinator.refused(ALICE, body, code, reason, tensors=coordinator.head)
    short = {site: raw for site, raw in honest.envelopes.items() if site != DAVE}
    body = coordinator.contribution(first, replace(honest, envelopes=short))
    coordinator.refused(ALICE, body, "stale", "of 3 sites for 4 participants", tensors=coordinator.head)
    second = coordinator.proposal(FOUR, attempt=1)
    coordinator.total(second, coordinator.committed(second))
    body = coordinator.contribution(first, honest)
    coordinator.refused(ALICE, body, "spent", "was already charged", tensors=coordinator.head)
    coordinator.refused(ALICE, CommitRequest(proposal=first), "spent", "was already charged")


def test_over_the_wire_one_who_is_alive_and_dead_a_dropped_vote_and_a_second_unmasking_are_refused(liar, federation):
    coordinator = liar("survivors")
    proposal = coordinator.proposal(FOUR)
    commitments = coordinator.committed(proposal)
    coordinator.total(proposal, commitments)
    raw = {site: envelope.encode() for site, envelope in commitments.envelopes.items()}
    transcript, living = transcript_of(proposal.terms, raw), FOUR[:3]

    def vote(site, survivors):
        return coordinator.ask(site, VoteRequest(survivors=SumSurvivors(transcript=transcript, survivors=survivors)))

    dead = {site: vote(site, living).vote for site in (ALICE, BOB, CAROL)}
    alive = vote(DAVE, FOUR)
    assert isinstance(alive, Voted)
    both = VoteRequest(survivors=SumSurvivors(transcript=transcript, survivors=FOUR))
    coordinator.refused(ALICE, both, "attempt", "this site's attempt is voted")
    for envelopes, reason in (
        ({**dead, DAVE: alive.vote}, "not of exactly the survivors"),
        ({ALICE: dead[ALICE], BOB: dead[BOB]}, "not of exactly the survivors"),
        ({**dead, CAROL: alive.vote}, "signed by key"),
    ):
        request = RevealRequest(votes=SumVotes(transcript=transcript, envelopes=envelopes))
        coordinator.refused(ALICE, request, "malformed" if "signed" in reason else "stale", reason)
    honest = RevealRequest(votes=SumVotes(transcript=transcript, envelopes=dead))
    shares = coordinator.ask(ALICE, honest).shares
    assert coordinator.ask(ALICE, honest).shares == shares
    coordinator.refused(ALICE, both, "attempt", "this site's attempt is over")
    again = RevealRequest(votes=SumVotes(transcript=transcript, envelopes={**dead, DAVE: alive.vote}))
    coordinator.refused(ALICE, again, "attempt", "this site's attempt is over")
    assert [len([c for c in federation.charges(site) if c.job == coordinator.job.digest]) for site in FOUR] == [1] * 4


@pytest.fixture
def mortal(federation, deployment, grid, sites):
    """Dave's site as a process of its own."""
    sites.leave(DAVE)
    command = [
        *(sys.executable, str(Path(__file__).with_name("small_site.py")), str(Path(__file__).parents[2])),
        *(str(federation.root), DAVE, deployment.address, str(deployment.authority)),
        str(federation.folder(DAVE) / "node_key"),
    ]
    process = deployment.start_site(DAVE, command)
    deployment.wait_online(timeout_seconds=PATIENCE_SECONDS)
    # Its predecessor may still count as online: up is who answers, if only that this is no message.
    assert GridCohort(grid, {DAVE: deployment._nodes[DAVE]}).ask({DAVE: b"?"}, deadline_seconds=PATIENCE_SECONDS)
    yield process
    process.kill()
    process.wait()
    # The deployment watches its processes, and this one was meant to end.
    deployment._processes.pop(f"site-{DAVE}")


def test_a_site_that_is_killed_between_the_phases_ends_its_attempt_in_time_and_the_next_goes_on(
    federation, deployment, grid, mortal
):
    job = federation.job(summing(minimum_sites=3), nonce="killed")

    def kill(bodies):
        if any(at(body, ContributeRequest, "train", attempt=0) for body in bodies.values()) and mortal.poll() is None:
            mortal.kill()
            mortal.wait()

    cohort = Carried(grid, deployment, federation, before=kill)
    run(federation, job, cohort)
    proof = verify_federation(federation.root, roster=federation.roster).jobs[job.digest]
    assert [len(closed.receipts) for closed in proof.rounds] == [4, 3, 3]
    assert [closed.attempt for closed in proof.rounds] == [0, 1, 0]
    waits = {}
    for bodies, wait in zip(cohort.bodies, cohort.waits, strict=True):
        body = next(iter(bodies.values()))
        if isinstance(body, CommitRequest | ContributeRequest):
            waits[place(body)] = waits.get(place(body), 0.0) + wait
    assert max(waits.values()) <= DEADLINE_SECONDS
    charges = {site: [c for c in federation.charges(site) if c.job == job.digest] for site in FOUR}
    assert {site: len(of) for site, of in charges.items()} == {ALICE: 4, BOB: 4, CAROL: 4, DAVE: 1}
