import threading
from pathlib import Path

import pytest

from clients import fleet, node
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


def test_who_is_refused_without_a_reason_is_told_first_what_heals_itself():
    hint = fleet._hint(401)
    assert hint.startswith("; the SuperLink was started again, which heals itself")
    assert "not enrolled, or the clock is off" in hint


class Told:
    """What an operator is told of a link, by a clock that stands until it is moved."""

    def __init__(self):
        self.states, self.now = [], 0.0
        self.tell = node._OnChange(self.states.append, clock=lambda: self.now)

    def retry(self, detail, *, phase=LinkPhase.REFUSED, seconds=15.0):
        """One more try, which fails."""
        self.now += seconds
        self.tell(LinkPhase.CONNECTING, "c.example:1")
        self.tell(phase, detail)

    def new(self):
        """The phases and details since this was last asked."""
        found = [(str(state.phase), state.detail) for state in self.states]
        self.states.clear()
        return found


def off(seconds, *, way="ahead of"):
    """What the public door says to whom its clock is off; other numbers at each retry."""
    said = (
        f"this request was signed {seconds} s {way} the SuperLink's clock, which says 2026-11-21 12:{seconds % 60:02}"
    )
    return f"SuperLink c.example:1: HTTP 401 ({said})"


def test_a_clock_that_is_wrong_is_told_once_and_not_at_each_retry():
    told = Told()
    for seconds in range(600, 610):
        told.retry(off(seconds))
    assert told.new() == [("connecting", "c.example:1"), ("refused", off(600))]


def test_a_reason_that_lasts_is_told_again_after_minutes_with_its_newest_numbers():
    told = Told()
    for seconds in range(600, 600 + 41):
        told.retry(off(seconds))
    # The first is told at 15 s; ten minutes are forty retries more.
    assert told.new()[1:] == [("refused", off(600)), ("refused", off(640))]


@pytest.mark.parametrize(
    ("detail", "phase"),
    [
        (off(600, way="behind"), LinkPhase.REFUSED),
        (off(600).replace("HTTP 401", "HTTP 403"), LinkPhase.REFUSED),
        (off(600).replace("c.example:1", "c.example:2"), LinkPhase.REFUSED),
        (off(600), LinkPhase.UNREACHABLE),
    ],
)
def test_another_reason_status_address_or_phase_is_told_at_once(detail, phase):
    told = Told()
    told.retry(off(600))
    told.new()
    told.retry(detail, phase=phase)
    assert told.new() == [(str(phase), detail)]


def test_a_link_that_comes_back_is_told_and_its_next_failure_too():
    told = Told()
    told.retry(off(600))
    for _ in range(3):
        told.tell(LinkPhase.ONLINE, "node 7 at c.example:1")
        told.now += 3600
    told.retry(off(600))
    phases = [phase for phase, _ in told.new()]
    # Being online is nothing that anybody has to be told again.
    assert phases == ["connecting", "refused", "online", "connecting", "refused"]
