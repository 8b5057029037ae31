import importlib.util
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from hypothesis import given
from hypothesis import strategies as st

from clients.wire import unwrap, wrap
from fedgrade.errors import RoundFailed
from server.grid_cohort import GridCohort

_spec = importlib.util.spec_from_file_location("memory_grid", Path(__file__).with_name("memory_grid.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
MemoryGrid = _module.MemoryGrid


def echo(message):
    return [(0, Message(wrap(unwrap(message.content) + b"!"), reply_to=message))]


def slow(message):
    return [(3, reply) for _, reply in echo(message)]


def silent(_message):
    return []


def failing(message):
    return [(0, Message(Error(2, "out of memory"), reply_to=message))]


def sending(content):
    return lambda message: [(0, Message(content, reply_to=message))]


def ask(nodes, requests, *, deadline_seconds=0.2, **settings):
    grid = MemoryGrid(dict(enumerate(nodes.values(), start=100)))
    cohort = GridCohort(grid, {site: 100 + index for index, site in enumerate(nodes)}, 0.005, **settings)
    return cohort.ask(requests, deadline_seconds=deadline_seconds)


@given(st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.binary(max_size=200)))
def test_every_site_that_is_asked_gets_its_own_bytes_and_answers(requests):
    replies = ask(dict.fromkeys("abcd", echo), requests, deadline_seconds=30)
    assert replies == {site: request + b"!" for site, request in requests.items()}


def test_replies_may_come_one_after_another():
    assert ask({"a": slow, "b": echo}, {"a": b"1", "b": b"2"}, deadline_seconds=30) == {"a": b"1!", "b": b"2!"}


def test_whoever_watches_is_told_all_the_time_who_has_not_answered():
    awaited = []
    ask({"a": echo, "b": silent}, {"a": b"1", "b": b"2"}, watch=lambda sites: awaited.append(set(sites)))
    assert awaited[0] == {"a", "b"}
    assert awaited[-1] == {"b"}


@pytest.mark.parametrize(
    "bad",
    [
        silent,
        failing,
        sending(RecordDict()),
        sending(RecordDict({"0": ConfigRecord({"envelope": "text", "place": 0})})),
        sending(RecordDict({"0": ConfigRecord({"envelope": b"", "more": 1})})),
        sending(RecordDict({"0": MetricRecord({"place": 0})})),
        sending(RecordDict({"0": ConfigRecord({"envelope": b"", "place": 0}), "more": ConfigRecord()})),
        sending(wrap(b"x" * 11)),
    ],
)
def test_a_site_that_does_not_answer_well_is_absent_and_the_others_are_not(bad, caplog):
    assert ask({"a": echo, "b": bad, "c": slow}, dict.fromkeys("abc", b"1"), max_reply_bytes=10) == {
        "a": b"1!",
        "c": b"1!",
    }
    assert "site b" in caplog.text


def test_a_site_without_a_node_is_absent(caplog):
    assert ask({"a": echo}, {"a": b"1", "stranger": b"1"}) == {"a": b"1!"}
    assert "stranger" in caplog.text


def test_a_node_that_flower_does_not_know_is_absent(caplog):
    cohort = GridCohort(MemoryGrid({100: echo}), {"a": 100, "b": 999}, 0.005)
    assert cohort.ask({"a": b"1", "b": b"1"}, deadline_seconds=30) == {"a": b"1!"}
    assert "did not take the message for node 999" in caplog.text


def test_a_late_reply_is_not_read_as_the_next_rounds():
    def second_time(message):
        replies = [] if not seen else echo(message)
        seen.append(message)
        return replies

    seen = []
    grid = MemoryGrid({100: second_time})
    cohort = GridCohort(grid, {"a": 100}, 0.005)
    assert cohort.ask({"a": b"first"}, deadline_seconds=0.05) == {}
    grid.waiting[seen[0].metadata.message_id] = echo(seen[0])
    assert cohort.ask({"a": b"second"}, deadline_seconds=30) == {"a": b"second!"}


def test_a_reply_to_another_request_is_ignored():
    def crossed(message):
        stranger = Message(message.content, 100, "query.fedgrade")
        stranger.metadata.__dict__["_message_id"] = "another"
        return [(0, Message(wrap(b"x"), reply_to=stranger)), *echo(message)]

    assert ask({"a": crossed}, {"a": b"1"}, deadline_seconds=30) == {"a": b"1!"}


def test_an_upload_that_flower_refuses_because_it_has_it_is_sent_again(monkeypatch):
    grid = MemoryGrid({100: echo})
    push, refused = grid.push_messages, []

    def refuse_once(messages):
        if not refused:
            refused.append(messages)
            raise ObjectPushError("object", 7, "session")
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", refuse_once)
    assert GridCohort(grid, {"a": 100}, 0.005).ask({"a": b"1"}, deadline_seconds=30) == {"a": b"1!"}


def test_a_site_that_cannot_be_sent_to_is_absent(monkeypatch, caplog):
    grid = MemoryGrid({100: echo, 101: echo})
    push = grid.push_messages

    def refuse_one(messages):
        if any(message.metadata.dst_node_id == 101 for message in messages):
            raise ObjectPushError("object", 7, "session")
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", refuse_one)
    cohort = GridCohort(grid, {"a": 100, "b": 101}, 0.005)
    assert cohort.ask({"a": b"1", "b": b"1"}, deadline_seconds=30) == {"a": b"1!"}
    assert "node 101" in caplog.text


def test_nobody_asked_is_nobody_absent():
    assert ask({"a": echo}, {}) == {}


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_deadline_that_is_over_is_refused(seconds):
    with pytest.raises(RoundFailed, match="above 0"):
        ask({"a": echo}, {"a": b""}, deadline_seconds=seconds)


class Revoking(dict):
    """Nodes of which one is struck off after so many looks."""

    def __init__(self, nodes, *, gone, after):
        super().__init__(nodes)
        self._gone, self._left = gone, after

    def _look(self):
        self._left -= 1
        if self._left < 0:
            self.pop(self._gone, None)

    def __contains__(self, site):
        self._look()
        return super().__contains__(site)


@pytest.mark.parametrize("after", range(0, 24, 3))
def test_a_site_that_is_revoked_meanwhile_is_neither_awaited_nor_taken(after):
    grid = MemoryGrid({100: silent, 101: slow})
    nodes = Revoking({"a": 100, "b": 101}, gone="a", after=after)
    replies = GridCohort(grid, nodes, 0.005).ask({"a": b"1", "b": b"2"}, deadline_seconds=600)
    assert replies == {"b": b"2!"}


def test_what_a_site_said_before_it_was_revoked_is_dropped():
    grid = MemoryGrid({100: echo, 101: slow})
    nodes = Revoking({"a": 100, "b": 101}, gone="a", after=4)
    assert GridCohort(grid, nodes, 0.005).ask({"a": b"1", "b": b"2"}, deadline_seconds=600) == {"b": b"2!"}
