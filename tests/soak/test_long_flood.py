"""The public port under a long flood of slow, broken, stolen and forged requests; the short form is in tests/server."""

import pytest

from clients.node_key import create_node_key
from server.deployment import Deployment
from tests.server.flood import ANSWERS, Caught, connection, withstand

pytestmark = [pytest.mark.slow, pytest.mark.flower]

LORISES, REQUESTS = 200, 10_000
MAX_GROWTH = 64 * 2**20


def test_ten_thousand_bad_requests_and_two_hundred_slow_ones_keep_no_node_waiting(tmp_path, publish):
    with Deployment(tmp_path / "run") as deployment:
        fleets = []
        for site in ("alpha", "beta"):
            deployment.enrol(site, create_node_key(tmp_path / site))
            fleets.append(connection(deployment, tmp_path / site))
            fleets[-1].activate()
        own, beta = fleets
        node, found, growth = withstand(deployment, own, Caught(beta), lorises_held=LORISES, requests=REQUESTS)
        for one in fleets:
            one.close()
    assert node.failure is None
    assert node.answers >= ANSWERS
    sent = sum(found.values())
    assert sent >= REQUESTS
    assert not {pair: times for pair, times in found.items() if pair[0] != pair[1] and pair[1] is not None}
    assert growth < MAX_GROWTH
    statuses = {pair[1]: 0 for pair in found}
    for (_, status), times in found.items():
        statuses[status] += times
    told = (
        f"{LORISES} connections that never finish a header, and {sent} bad requests over 8 connections, on one "
        f"machine with a node that meanwhile asked {node.answers} times and was answered each time. The SuperLink grew "
        f"by {growth / 2**20:.0f} MB."
    )
    rows = [f"| {status or 'connection ended'} | {times} |" for status, times in sorted(statuses.items(), key=str)]
    publish("flood", [told, "", "| answer | times |", "|---|---|", *rows])
