import threading
from pathlib import Path

import pytest

from clients.node import LinkPhase, NodeLink, serve
from clients.node_key import create_node_key
from fedgrade.errors import DocumentRefused


def link(**changes):
    settings = {"address": "127.0.0.1:1", "root_certificate": Path("ca.pem"), "node_key": Path("node")}
    return NodeLink(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": "superlink"}, "expected host:port"),
        ({"address": ":443"}, "expected host:port"),
        ({"address": "host:port"}, "expected host:port"),
        ({"busy_poll_seconds": 0.0}, "above 0"),
        ({"busy_poll_seconds": 4.0}, "at most 3.0"),
        ({"heartbeat_seconds": 5.0}, "10 to 1800"),
        ({"retry_cap_seconds": 0.0}, "above 0"),
        ({"max_message_bytes": 0}, "above 0"),
    ],
)
def test_an_impossible_link_is_refused(changes, message):
    with pytest.raises(DocumentRefused, match=message):
        link(**changes)


def test_a_missing_certificate_ends_the_node_with_one_line(tmp_path):
    create_node_key(tmp_path / "node")
    with pytest.raises(DocumentRefused, match="ask the coordinator"):
        serve(link(root_certificate=tmp_path / "ca.pem"), bytes, stop=threading.Event())


def test_a_certificate_that_is_none_is_told_and_not_fatal(tmp_path):
    create_node_key(tmp_path / "node")
    (tmp_path / "ca.pem").write_text("not a certificate")
    stop, states = threading.Event(), []

    def on_state(state):
        states.append(state)
        if state.phase is LinkPhase.REFUSED:
            stop.set()

    serve(link(root_certificate=tmp_path / "ca.pem", node_key=tmp_path / "node"), bytes, stop=stop, on_state=on_state)
    assert [state.phase for state in states] == [LinkPhase.CONNECTING, LinkPhase.REFUSED, LinkPhase.STOPPED]
    assert "not usable PEM" in states[1].detail
