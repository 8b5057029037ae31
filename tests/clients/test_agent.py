import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from clients import agent
from clients.agent import AgentClient, AgentServer, AgentUnavailable, Words
from clients.gate import Gate, Mode
from clients.own_user import OwnUserDoor, own_user_or_root, peer_user
from fedgrade.errors import DocumentRefused


@pytest.fixture
def path():
    # pytest's own folders are too deep for a Unix socket's name.
    with tempfile.TemporaryDirectory(prefix="agent-") as folder:
        yield Path(folder) / "agent.sock"


def test_the_socket_carries_bytes_there_and_back(path):
    envelope = bytes(range(256)) * 40_000
    with AgentServer(Gate(lambda request: request[::-1]), path), AgentClient(path) as client:
        assert client.answer(envelope, timeout_seconds=30) == envelope[::-1]


def test_only_the_owner_may_open_the_socket(path):
    with AgentServer(Gate(bytes), path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


def test_the_kernel_says_whose_process_connects():
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        assert peer_user(here) == os.geteuid()
    assert own_user_or_root(os.geteuid())
    assert not own_user_or_root(os.geteuid() + 1)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that it forks, and has threads
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_turned_away_even_where_the_folder_is_open(path, caplog):
    reached, told = [], os.pipe()
    with AgentServer(Gate(lambda request: reached.append(request) or b""), path):
        path.parent.chmod(0o755)
        path.chmod(0o666)
        other = os.fork()
        if other == 0:
            # Nothing but system calls from here on: this is a copy of a process with threads.
            os.setresuid(65534, 65534, 65534)
            outer, inner = (_answer_at(each) for each in (path, path.parent / "in" / path.name))
            os.write(told[1], outer + b"|" + inner)
            os._exit(0)
        os.waitpid(other, 0)
        assert os.read(told[0], 100) == b"closed|PermissionError"
        with AgentClient(path) as client:
            assert client.status().answered == 0
    for end in told:
        os.close(end)
    assert reached == []
    assert "a process of user 65534 was turned away" in caplog.text


def _answer_at(path):
    """What a stranger gets at the socket ``path``: gRPC's server would speak first."""
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(10)
        try:
            stranger.connect(str(path))
            stranger.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            return stranger.recv(100) or b"closed"
        except (ConnectionResetError, BrokenPipeError):
            return b"closed"
        except OSError as error:
            return type(error).__name__.encode()


def test_whoever_is_not_admitted_gets_no_byte_further(path):
    inner = path.parent / "inner.sock"
    with socket.socket(socket.AF_UNIX) as listener, OwnUserDoor(path, inner, admits=lambda _user: False):
        listener.bind(str(inner))
        listener.listen()
        listener.settimeout(0.2)
        assert _answer_at(path) == b"closed"
        with pytest.raises(TimeoutError):
            listener.accept()


# A process that can open one file more: a socket is one, and the event loop of the thread behind it needs others.
NO_FILES = """
import os, resource, sys
from pathlib import Path
from clients.own_user import OwnUserDoor
from fedgrade.errors import DocumentRefused

lowest = os.open(os.devnull, os.O_RDONLY)
os.close(lowest)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, lowest + 1))
path = Path(sys.argv[1])
try:
    OwnUserDoor(path, path.parent / "in").__enter__()
except DocumentRefused as error:
    print(error)
"""


def test_a_door_whose_thread_cannot_listen_is_one_clear_error_and_leaves_no_socket(path):
    done = subprocess.run(
        [sys.executable, "-c", NO_FILES, path], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"socket {path}: nobody listens at it ([Errno 24] Too many open files); start again\n"
    assert not path.exists()


# A door that closes while connections through it are open at both ends.
CUT_OFF = """
import gc, socket, sys
from pathlib import Path
from clients.own_user import OwnUserDoor

path = Path(sys.argv[1])
inner = path.parent / "in"
listener = socket.create_server(str(inner), family=socket.AF_UNIX)
held = []
with OwnUserDoor(path, inner):
    for _ in range(5):
        outer = socket.socket(socket.AF_UNIX)
        outer.connect(str(path))
        held += [outer, listener.accept()[0]]
gc.collect()
print([end.recv(1) for end in held])
for end in (*held, listener):
    end.close()
"""


def test_what_is_under_way_is_cut_off_at_the_end_without_a_word_in_the_log(path):
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", CUT_OFF, path], capture_output=True, text=True, check=True, timeout=60
    )
    assert (done.stdout, done.stderr) == (f"{[b''] * 10}\n", "")


def test_a_folder_that_is_another_users_is_refused(path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: path.parent.stat().st_uid + 1)
    with pytest.raises(DocumentRefused, match="choose one of your own"), AgentServer(Gate(bytes), path):
        pass


def test_a_folder_open_to_others_is_refused(path):
    path.parent.chmod(0o755)
    with pytest.raises(DocumentRefused, match="chmod 700"), AgentServer(Gate(bytes), path):
        pass


def test_a_paused_site_is_unavailable_until_it_is_resumed(path):
    with AgentServer(Gate(bytes), path, words=Words(link=lambda: "online")), AgentClient(path) as client:
        assert client.pause().mode is Mode.PAUSED
        with pytest.raises(AgentUnavailable, match="UNAVAILABLE: the site is paused"):
            client.answer(b"x", timeout_seconds=5)
        assert client.resume().mode is Mode.RUNNING
        assert client.answer(b"x", timeout_seconds=5) == b"x"
        status = client.status()
    assert (status.mode, status.answered, status.answering, status.link) == (Mode.RUNNING, 1, False, "online")


def test_drain_tells_the_process_that_it_may_end(path):
    gate = Gate(bytes)
    with AgentServer(gate, path), AgentClient(path) as client:
        assert client.drain().mode is Mode.DRAINING
    assert gate.drained.is_set()


def test_the_caller_learns_nothing_from_a_failure_inside(path, caplog):
    def fail(_request):
        raise ValueError("photo 17 of lot 4")

    with AgentServer(Gate(fail), path), AgentClient(path) as client, pytest.raises(AgentUnavailable) as caught:
        client.answer(b"x", timeout_seconds=5)
    assert "photo" not in str(caught.value)
    assert "photo 17" in caplog.text


@pytest.mark.parametrize("killed", [False, True])
def test_nobody_listening_is_one_line_that_says_how_to_start_a_node(path, killed):
    if killed:
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(path))
    line = rf"^site at {path}: no node runs; start it with `fedgrade site up`[^\n]*$"
    with AgentClient(path) as client, pytest.raises(AgentUnavailable, match=line):
        client.status()


def test_a_second_process_does_not_take_over_a_live_socket(path):
    with AgentServer(Gate(bytes), path):
        with pytest.raises(DocumentRefused, match="already listens"), AgentServer(Gate(bytes), path):
            pass
        with AgentClient(path) as client:
            assert client.status().mode is Mode.RUNNING


def test_a_dead_socket_is_replaced(path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with AgentServer(Gate(bytes), path), AgentClient(path) as client:
        assert client.answer(b"x", timeout_seconds=5) == b"x"


def test_a_file_in_the_sockets_place_is_left_alone(path):
    path.write_text("notes")
    with pytest.raises(DocumentRefused, match="another kind"), AgentServer(Gate(bytes), path):
        pass
    assert path.read_text() == "notes"


def test_a_path_too_long_for_a_socket_is_refused(path):
    with pytest.raises(DocumentRefused, match="at most 100 bytes"), AgentServer(Gate(bytes), path / ("x" * 100)):
        pass


def test_an_oversized_envelope_is_not_sent(path, monkeypatch):
    monkeypatch.setattr(agent, "MAX_ENVELOPE_BYTES", 10)
    with AgentClient(path) as client, pytest.raises(DocumentRefused, match="at most 10"):
        client.answer(b"x" * 11)
