"""Real processes on loopback: TLS, signed requests, bytes there and back, and everything that may go wrong between.

One deployment serves the module. The test takes the run's task itself, as superexec would, so that it holds a real
Grid; nodes are threads of the test, which makes hostile ones easy.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from flwr.app import Message
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from clients.fleet import LinkDown
from clients.node import LinkPhase, NodeLink, serve
from clients.node_key import create_node_key, load_node_key
from clients.outgoing import answer_to
from clients.request_signature import RequestSigner
from clients.wire import wrap
from fedgrade.federation.pieces import MESSAGE_TYPE, PIECE_BYTES
from server.certificates import certify
from server.control import Control, ControlRefused
from server.deployment import Deployment, DeploymentFailed
from server.grid_cohort import GridCohort
from server.posting import post_of
from tests.server.flood import connection

pytestmark = pytest.mark.flower

_spec = importlib.util.spec_from_file_location("hostile_bundle", Path(__file__).with_name("hostile_bundle.py"))
hostile_bundle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hostile_bundle)

PATIENCE = 60.0


class Node:
    """A resident node in a thread."""

    def __init__(self, deployment, key, answer, authority=None):
        self.stop, self.phases, self._changed = threading.Event(), [], threading.Condition()
        link = NodeLink(
            address=deployment.address,
            root_certificate=authority or deployment.authority,
            node_key=key,
            idle_poll_seconds=0.3,
            retry_cap_seconds=1.0,
        )
        settings = {"stop": self.stop, "on_state": self._note}
        self._thread = threading.Thread(target=serve, args=(link, answer), kwargs=settings, daemon=True)
        self._thread.start()

    def _note(self, state):
        with self._changed:
            self.phases.append(state)
            self._changed.notify_all()

    def wait_for(self, phase, *, after=0):
        """The first state in ``phase`` among those after the first ``after``."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(s.phase is phase for s in self.phases[after:]), PATIENCE)
            return next(state for state in self.phases[after:] if state.phase is phase)

    def end(self):
        self.stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def running(*nodes):
    try:
        yield nodes
    finally:
        for node in nodes:
            node.stop.set()
        for node in nodes:
            node.end()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with Deployment(tmp_path_factory.mktemp("run")) as running_deployment:
        # The test takes the run's task itself.
        running_deployment.process("superexec").send_signal(signal.SIGSTOP)
        yield running_deployment
        running_deployment.process("superexec").send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    return tmp_path_factory.mktemp("mark") / "the-bundle-ran"


@pytest.fixture(scope="module")
def grid(deployment, mark):
    deployment._control._client.StartRun(hostile_bundle.start_request(mark))
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
    # As flwr-serverapp does; without it the task's token expires.
    heart = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    heart.start()
    yield grid
    heart.stop()
    grid.close()


@pytest.fixture(scope="module")
def enrolled(deployment, tmp_path_factory):
    """Node keys of three sites, by name."""
    folder = tmp_path_factory.mktemp("keys")
    for site in ("alpha", "beta", "gamma"):
        deployment.enrol(site, create_node_key(folder / site))
    return {site: folder / site for site in ("alpha", "beta", "gamma")}


@pytest.fixture(scope="module")
def nodes(deployment, enrolled):
    return {site: deployment.enrol(site, key.with_name(key.name + ".pub")) for site, key in enrolled.items()}


def admin(deployment):
    return f"127.0.0.1:{deployment._admin_port}"


def runtime_client(deployment, secret=None):
    interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
    if secret is not None:
        methods = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        interceptors.append(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=methods))
    return RuntimeHttpClient.from_server_address(
        admin(deployment),
        insecure=False,
        root_certificates=deployment.admin_authority.read_bytes(),
        interceptors=interceptors,
    )


def marked(site):
    return lambda request: request + site.encode()


def online(deployment, enrolled, **answers):
    started = [Node(deployment, enrolled[site], answers.get(site, marked(site))) for site in enrolled]
    for node in started:
        node.wait_for(LinkPhase.ONLINE)
    return running(*started)


@pytest.mark.parametrize("size", [8_000, 8_000_000])
def test_bytes_go_there_and_back_for_several_rounds(deployment, grid, enrolled, nodes, size):
    cohort = GridCohort(grid, nodes)
    with online(deployment, enrolled):
        for round_index in range(2):
            requests = {site: os.urandom(size) + bytes([round_index]) for site in nodes}
            assert cohort.ask(requests, deadline_seconds=PATIENCE) == {
                site: request + site.encode() for site, request in requests.items()
            }


def test_a_silent_site_does_not_keep_the_others_answers(deployment, grid, enrolled, nodes):
    woken = threading.Event()

    def sleep(request):
        woken.wait(PATIENCE)
        return request

    with online(deployment, enrolled, beta=sleep):
        replies = GridCohort(grid, nodes).ask(dict.fromkeys(nodes, b"?"), deadline_seconds=5.0)
        woken.set()
    assert replies == {"alpha": b"?alpha", "gamma": b"?gamma"}


def test_a_node_that_is_told_to_end_in_mid_answer_sends_it_first(deployment, grid, enrolled, nodes):
    """As on SIGTERM: what was charged for is not thrown away."""
    asked = threading.Event()

    def slow(_request):
        asked.set()
        assert node.stop.wait(PATIENCE)
        return b"done"

    with running(Node(deployment, enrolled["alpha"], slow)) as (node,):
        node.wait_for(LinkPhase.ONLINE)
        ending = threading.Thread(target=lambda: (asked.wait(PATIENCE), node.end()))
        ending.start()
        cohort = GridCohort(grid, {"alpha": nodes["alpha"]}, poll_seconds=1.0)  # looks when the node has gone
        assert cohort.ask({"alpha": b"?"}, deadline_seconds=PATIENCE) == {"alpha": b"done"}
        ending.join(PATIENCE)
        assert node.phases[-1].phase is LinkPhase.STOPPED


def test_a_site_that_fails_is_absent_at_once_and_tells_no_secrets(deployment, grid, enrolled, nodes, caplog):
    def fail(_request):
        raise ValueError("photo 17 of lot 4")

    with online(deployment, enrolled, beta=fail):
        replies = GridCohort(grid, nodes).ask(dict.fromkeys(nodes, b"?"), deadline_seconds=PATIENCE)
    assert replies == {"alpha": b"?alpha", "gamma": b"?gamma"}
    told = [record.getMessage() for record in caplog.records if record.name == "server.grid_cohort"]
    assert len(told) == 1
    assert "photo" not in told[0]


def test_a_reply_that_is_announced_and_never_sent_holds_up_no_one(deployment, grid, enrolled, nodes):
    liar = connection(deployment, enrolled["beta"])
    liar.activate()

    def lie():
        while (parcel := liar.receive()) is None:
            time.sleep(0.05)
        liar._client.PushObject = lambda _request: type("Stored", (), {"stored": True})()
        liar.send(answer_to(parcel.message, b"never sent"))

    (lying := threading.Thread(target=lie, daemon=True)).start()
    honest = {site: enrolled[site] for site in ("alpha", "gamma")}
    with online(deployment, honest):
        replies = GridCohort(grid, nodes).ask(dict.fromkeys(nodes, b"?"), deadline_seconds=5.0)
    lying.join(PATIENCE)
    liar.close()
    assert replies == {"alpha": b"?alpha", "gamma": b"?gamma"}


def test_a_reply_whose_sending_is_cut_off_half_way_is_completed(deployment, grid, enrolled, nodes):
    fleet, envelope, tried = connection(deployment, enrolled["beta"]), os.urandom(2 * PIECE_BYTES + 1), []
    fleet.activate()
    push = fleet._client.PushObject

    def cut(request):
        tried.append(request.object_id)
        if tried.index(request.object_id) == 1:
            raise httpx.ConnectError("cut")
        return push(request)

    def stumble():
        while (parcel := fleet.receive()) is None:
            pass
        outgoing = answer_to(parcel.message, envelope)
        fleet._client.PushObject = cut
        with pytest.raises(LinkDown):
            fleet.send(outgoing)
        time.sleep(1.0)  # the run looks meanwhile, and waits for the rest
        fleet._client.PushObject = push
        fleet.send(outgoing)

    (stumbling := threading.Thread(target=stumble, daemon=True)).start()
    replies = GridCohort(grid, {"beta": nodes["beta"]}).ask({"beta": b"?"}, deadline_seconds=PATIENCE)
    stumbling.join(PATIENCE)
    fleet.close()
    assert replies == {"beta": envelope}
    assert len(tried) > 1


def test_this_superlink_asks_for_records_alone(deployment, grid, enrolled, nodes, monkeypatch):
    client, announced, announce = grid._runtime_client, [], grid._runtime_client.PushMessages
    monkeypatch.setattr(client, "PushMessages", lambda request: announced.append(announce(request)) or announced[-1])
    message = Message(wrap(os.urandom(16)), nodes["alpha"], MESSAGE_TYPE, ttl=60.0)
    with online(deployment, enrolled):
        (taken,) = post_of(grid).send([message])
    (record,) = message.content.values()
    assert set(announced[0].objects_to_push) == {taken, record.object_id}


def test_an_oversized_request_is_refused_and_the_node_lives_on(deployment, grid, enrolled, nodes):
    link = NodeLink(
        address=deployment.address,
        root_certificate=deployment.authority,
        node_key=enrolled["alpha"],
        idle_poll_seconds=0.3,
        max_message_bytes=100_000,
    )
    stop, asked = threading.Event(), []

    def answer(request):
        asked.append(len(request))
        return b"ok"

    thread = threading.Thread(target=serve, args=(link, answer), kwargs={"stop": stop}, daemon=True)
    thread.start()
    cohort = GridCohort(grid, {"alpha": nodes["alpha"]})
    # In as many pieces as 100,000 bytes need, and in more.
    assert cohort.ask({"alpha": b"x" * 300_000}, deadline_seconds=PATIENCE) == {}
    assert cohort.ask({"alpha": b"x" * 5_000_000}, deadline_seconds=PATIENCE) == {}
    assert cohort.ask({"alpha": b"x" * 99_000}, deadline_seconds=PATIENCE) == {"alpha": b"ok"}
    stop.set()
    thread.join(PATIENCE)
    assert asked == [99_000]


def test_another_authority_is_refused_before_a_byte_is_sent(deployment, enrolled, tmp_path):
    impostor = certify(tmp_path, [], now=datetime.now(UTC)).authority
    with running(Node(deployment, enrolled["alpha"], bytes, authority=impostor)) as (node,):
        assert "not signed by the authority" in node.wait_for(LinkPhase.REFUSED).detail


def test_a_key_that_nobody_enrolled_is_refused(deployment, tmp_path):
    create_node_key(tmp_path / "stranger")
    with running(Node(deployment, tmp_path / "stranger", bytes)) as (node,):
        assert "SuperLink" in node.wait_for(LinkPhase.REFUSED).detail
    assert all(state.phase is not LinkPhase.ONLINE for state in node.phases)


def test_a_killed_node_s_successor_is_let_in_at_once_and_a_copy_of_its_folder_is_not(deployment, tmp_path):
    key = tmp_path / "own" / "delta"
    deployment.enrol("delta", create_node_key(key))
    program = [sys.executable, str(Path(__file__).with_name("echo_node.py")), deployment.address]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*program, str(deployment.authority), str(key)], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert any(line.startswith(b"online") for line in process.stdout)
        process.kill()
    copied = Path(shutil.copytree(key.parent, tmp_path / "copy")) / key.name
    with running(Node(deployment, copied, bytes)) as (node,):
        node.wait_for(LinkPhase.REFUSED)
    with running(Node(deployment, key, bytes)) as (node,):
        node.wait_for(LinkPhase.ONLINE)
        assert all(state.phase is not LinkPhase.REFUSED for state in node.phases)


def test_a_key_is_enrolled_once(deployment, enrolled):
    with pytest.raises(ControlRefused):
        deployment._control.register(enrolled["alpha"].with_name("alpha.pub"), "again")


def fetch(deployment, port, path, **headers):
    own = port == deployment._admin_port
    context = ssl.create_default_context(cafile=str(deployment.admin_authority if own else deployment.authority))
    request = urllib.request.Request(f"https://127.0.0.1:{port}{path}", headers=headers, data=b"")
    try:
        with urllib.request.urlopen(request, context=context, timeout=PATIENCE) as response:  # noqa: S310
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json"])
def test_the_public_port_serves_nodes_only(deployment, path):
    public = deployment.address.rpartition(":")[2]
    assert fetch(deployment, public, path) == 404


def test_the_admin_port_wants_the_token(deployment):
    assert fetch(deployment, deployment._admin_port, "/v1/control/list-nodes") == 401
    wrong = Control(admin(deployment), authority=deployment.admin_authority, token=b"wrong")
    with wrong, pytest.raises(ControlRefused, match="401"):
        wrong.online()


def test_a_partners_key_opens_nothing_on_the_admin_port(deployment, enrolled):
    """It is enrolled, and signs there as it does where nodes are served."""
    client = ControlHttpClient.from_server_address(
        admin(deployment),
        insecure=False,
        root_certificates=deployment.admin_authority.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            RequestSigner(load_node_key(enrolled["alpha"])),
        ],
    )
    with contextlib.closing(client), pytest.raises(httpx.HTTPStatusError, match="401"):
        client.ListNodes(ListNodesRequest())


def test_monitoring_is_on_the_admin_port_alone_and_wants_the_token(deployment):
    assert fetch(deployment, deployment._admin_port, "/metrics") == 401
    assert fetch(deployment, deployment.address.rpartition(":")[2], "/metrics") == 404


def test_a_run_is_not_handed_to_who_lacks_the_secret(deployment):
    request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    for secret in (None, b"guess"):
        with runtime_client(deployment, secret) as client, pytest.raises(Exception, match=r"401|403"):
            client.AcquireTask(request)


def test_a_coordinators_bundle_was_neither_fetched_nor_run(deployment, grid, mark):
    assert grid.run.run_id
    assert not mark.exists()
    assert "GetFab" not in (deployment.run_directory / "logs" / "superlink.log").read_text()


def test_a_node_stops_promptly_while_its_superlink_is_away(deployment, enrolled):
    away = type("Away", (), {"address": "127.0.0.1:9", "authority": deployment.authority})()
    node = Node(away, enrolled["alpha"], bytes)
    node.wait_for(LinkPhase.UNREACHABLE)
    node.end()


def test_a_superlink_that_was_killed_is_started_again_and_its_nodes_come_back(tmp_path):
    with Deployment(tmp_path) as deployment:
        key = tmp_path / "alpha"
        public = create_node_key(key)
        deployment.enrol("alpha", public)
        with running(Node(deployment, key, bytes)) as (node,):
            node.wait_for(LinkPhase.ONLINE)
            deployment.process("superlink").kill()
            deployment.process("superlink").wait()
            with pytest.raises(DeploymentFailed, match="superlink ended"):
                deployment.must_be_alive()
            seen = len(node.phases)
            deployment.restart()
            assert deployment.control.nodes() == ()
            deployment.enrol("alpha", public)
            node.wait_for(LinkPhase.ONLINE, after=seen)
            deployment.must_be_alive()
