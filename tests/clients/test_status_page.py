"""What a site's operator sees of it."""

import pytest
from rich.console import Console

from clients.agent import AgentClient, AgentServer, Words
from clients.gate import Gate
from clients.status_page import page
from fedgrade.federation.activity import AccountStanding, Activity
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import AccountKey


@pytest.fixture
def path(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "agent.sock"


def shown(path, words, *, width=100):
    """The page that a real socket's status gives, as text."""
    with AgentServer(Gate(bytes), path, words=words), AgentClient(path) as client:
        console = Console(width=width, highlight=False, color_system=None)
        with console.capture() as captured:
            console.print(page(client.status()))
    return captured.get()


def standing(partition, epsilon, ceiling=8.0):
    account = AccountKey(partner=SiteId("site-1"), lineage="panels", cohort="2026-11", partition=partition)
    return AccountStanding(account=account, epsilon=epsilon, ceiling=ceiling)


def test_a_fresh_site_says_that_nothing_happened_yet(path):
    text = shown(path, Words())
    assert "running, idle, 0 requests answered" in text
    assert "job           none yet" in text
    assert "no data is under account yet" in text
    assert "undelivered" not in text


def test_answers_that_were_paid_for_and_not_seen_to_leave_are_told(path):
    assert "undelivered   2 of the answers that were charged for" in shown(path, Words(undelivered=lambda: 2))


def test_job_refusal_and_budgets_are_told_and_rounded_against_the_site(path):
    activity = Activity(job="cells", stage="train, round 12 of 60", refusal="budget: account would pass 8.00")
    words = Words(
        link=lambda: "online", activity=lambda: activity,
        standings=lambda: (standing("train", 4.001), standing("test", 9.5)),
    )  # fmt: skip
    text = shown(path, words)
    assert "cells: train, round 12 of 60" in text
    assert "budget: account would pass 8.00" in text
    training, held_out = (line for line in text.splitlines() if line.startswith("2026-11"))
    assert "4.01" in training
    assert training.count("█") == training.count("·") == 12
    assert "9.50" in held_out
    assert "·" not in held_out


def test_words_of_others_steer_no_terminal(path):
    text = shown(path, Words(activity=lambda: Activity(job="\x1b[2Jcells\n", stage="x", refusal="\x07")))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "?[2Jcells?" in text
