"""The SuperLink's process, started as it is in earnest: what it logs, and how it ends where it cannot go on."""

import contextlib
import json
import re
import socket
import threading

import pytest

from fedgrade.logs import FORMAT
from server.deployment import Deployment, DeploymentFailed, Listen
from server.keeper import others_alive

pytestmark = pytest.mark.flower


def test_every_line_of_its_log_is_json_where_the_environment_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv(FORMAT, "json")
    with Deployment(tmp_path) as deployment:
        deployment.control.online()
    lines = (tmp_path / "logs" / "superlink.log").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    assert ("INFO", "flwr", "ControlServicer.ListNodes") in [
        (one["level"], one["logger"], one["message"]) for one in said
    ]
    assert {one["logger"] for one in said} == {"flwr"}


def test_its_log_is_plain_text_without_colours_otherwise(tmp_path):
    with Deployment(tmp_path) as deployment:
        deployment.control.online()
    text = (tmp_path / "logs" / "superlink.log").read_text()
    assert re.search(r"^2\S+ \S+ INFO ControlServicer\.ListNodes$", text, re.MULTILINE)
    assert "\x1b" not in text


@contextlib.contextmanager
def taken_port():
    """A port of somebody who listens there, and ends whatever connects."""
    taken = socket.create_server(("127.0.0.1", 0))

    def end():
        with contextlib.suppress(OSError):
            while True:
                taken.accept()[0].close()

    ending = threading.Thread(target=end)
    ending.start()
    try:
        yield taken.getsockname()[1]
    finally:
        taken.shutdown(socket.SHUT_RDWR)
        ending.join()
        taken.close()


@pytest.mark.parametrize("listener", ["public_port", "admin_port"])
@pytest.mark.parametrize("style", ["text", "json"])
def test_a_port_that_is_taken_is_one_line_with_what_to_do(tmp_path, monkeypatch, listener, style):
    monkeypatch.setenv(FORMAT, style)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "superlink.log").write_text("cannot listen on yesterday\n")
    with (
        taken_port() as port,
        pytest.raises(DeploymentFailed) as refused,
        Deployment(tmp_path, listen=Listen(**{listener: port})),
    ):
        pass
    assert str(refused.value) == (
        f"superlink ended with code 1; cannot listen on 127.0.0.1 port {port}: Address already in use; another process "
        "does; end it, or choose another port in coordinator.yaml"
    )
    assert len((tmp_path / "logs" / "superlink.log").read_text().splitlines()) == 2


def test_an_interface_that_is_none_of_this_machine_s_is_one_line(tmp_path):
    with pytest.raises(DeploymentFailed) as refused, Deployment(tmp_path, listen=Listen(interface="192.0.2.1")):
        pass
    assert "correct `interface` in coordinator.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_that_cannot_start_ends_with_its_reason(tmp_path):
    with Deployment(tmp_path) as deployment:
        run_id = deployment.submit()
        with pytest.raises(DeploymentFailed, match="enrol the sites first"):
            deployment.follow(run_id)
        keeper = deployment._keeper.pid
    assert not others_alive(keeper)
