import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients.agent import AgentServer, AgentUnavailable
from clients.app import SOCKETS, app
from clients.gate import Gate
from clients.wire import unwrap, wrap
from fedgrade.errors import DocumentRefused, MessageRefused
from fedgrade.federation.pieces import MESSAGE_TYPE


@pytest.fixture
def folder(monkeypatch):
    monkeypatch.delenv(SOCKETS, raising=False)
    with tempfile.TemporaryDirectory(prefix="app-") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Flower stamps messages with the task of its process."""
    for name, value in (("_run_id", 1), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


def context(**node_config):
    named = {key.replace("_", "-"): value for key, value in node_config.items()}
    return Context(run_id=1, node_id=2, node_config=named, state=RecordDict(), run_config={})


def request(content=None, kind=MESSAGE_TYPE):
    return Message(wrap(b"grade") if content is None else content, 2, kind)


def test_a_stock_supernode_reaches_the_site_by_its_configured_socket(folder):
    with AgentServer(Gate(lambda given: given + b"!"), folder / "site.sock"):
        reply = app(request(), context(agent_socket=str(folder / "site.sock")))
    assert unwrap(reply.content) == b"grade!"


def test_a_simulated_node_reaches_the_site_of_its_partition(folder, monkeypatch):
    monkeypatch.setenv(SOCKETS, str(folder))
    with AgentServer(Gate(lambda given: given + b"3"), folder / "3.sock"):
        reply = app(request(), context(partition_id=3))
    assert unwrap(reply.content) == b"grade3"


def test_a_node_says_which_partition_it_is():
    reply = app(request(RecordDict({"q": ConfigRecord()}), "query.partition"), context(partition_id=4))
    assert reply.content["partition-id"]["partition-id"] == 4


@pytest.mark.usefixtures("folder")
def test_without_a_socket_the_operator_is_told_what_to_configure():
    with pytest.raises(DocumentRefused, match="--node-config"):
        app(request(), context(partition_id=0))


def test_a_site_that_is_not_up_is_one_clear_error(folder):
    with pytest.raises(AgentUnavailable, match="no node runs"):
        app(request(), context(agent_socket=str(folder / "none.sock")))


def test_a_message_of_another_shape_never_reaches_the_site(folder):
    asked = []
    with AgentServer(Gate(asked.append), folder / "site.sock"), pytest.raises(MessageRefused):
        app(
            request(RecordDict({"fedgrade": ConfigRecord({"code": "x"})})),
            context(agent_socket=str(folder / "site.sock")),
        )
    assert asked == []


@pytest.mark.parametrize(
    "module", ["clients.app", "clients.node", "server.app", "server.deployment", "server.superlink"]
)
def test_a_door_does_not_import_torch(module):
    code = f"import sys, {module}; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
