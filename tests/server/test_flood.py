"""The public port of a real SuperLink under a flood, while an enrolled node goes on as if nothing were."""

import asyncio
import re
import ssl
import time

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree

from clients.fleet import LinkRefused
from clients.node_key import create_node_key
from server.connections import Limits
from server.deployment import Deployment
from tests.server.flood import ANSWERS, Caught, connection, flood, lorises, withstand

pytestmark = pytest.mark.flower

LORISES, REQUESTS = 200, 2_500  # tests/soak/test_long_flood.py has more
MAX_GROWTH = 64 * 2**20


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    with Deployment(tmp_path_factory.mktemp("flood")) as running:
        yield running


@pytest.fixture(scope="module")
def fleets(deployment, tmp_path_factory):
    """Connections of two enrolled nodes; the second one's requests are caught."""
    folder = tmp_path_factory.mktemp("keys")
    opened = []
    for site in ("alpha", "beta"):
        deployment.enrol(site, create_node_key(folder / site))
        opened.append(connection(deployment, folder / site))
        opened[-1].activate()
    yield opened
    for one in opened:
        one.close()


def test_a_node_is_answered_throughout_and_strangers_cost_little_memory(deployment, fleets):
    own, beta = fleets
    node, found, growth = withstand(deployment, own, Caught(beta), lorises_held=LORISES, requests=REQUESTS)
    assert node.failure is None
    assert node.answers >= ANSWERS
    assert sum(found.values()) >= REQUESTS
    # An answer may be lost with its connection where the sender was still speaking; a wrong one never comes.
    assert not {pair: times for pair, times in found.items() if pair[0] != pair[1] and pair[1] is not None}
    assert found[401, 401] > REQUESTS / 4
    assert growth < MAX_GROWTH


def test_a_caught_request_is_of_no_use(deployment, fleets):
    _, beta = fleets
    caught = Caught(beta)
    thief = [
        (401, caught.raw()),
        (401, caught.raw(path="/v1/fleet/deactivate-node")),
        (401, caught.raw(body=b"\0" * len(caught.request.content))),
    ]
    found = asyncio.run(flood(deployment, thief, lanes=1))
    assert found == {(401, 401): 3}
    assert beta.receive() is None


def test_a_key_speaks_for_its_own_node_alone(fleets):
    own, beta = fleets
    theirs, beta._node = beta._node, own._node
    for ask in (beta.heartbeat, beta.receive):
        with pytest.raises(LinkRefused, match="401"):
            ask()
    beta._node = theirs
    assert beta.receive() is None


@pytest.mark.parametrize(("source", "status"), [(None, 400), (1, 403), ("own", 403)])
def test_a_key_pushes_nothing_but_replies_of_its_own_node(fleets, source, status):
    own, _ = fleets
    request = PushMessagesRequest(node=own._node)
    if source is not None:
        name = "ab" * 32
        source = own._node.node_id if source == "own" else source
        request.messages_list.append(Message(metadata=Metadata(run_id=1, message_id=name, src_node_id=source)))
        request.message_object_trees.append(ObjectTree(object_id=name))
    with pytest.raises(LinkRefused, match=f"HTTP {status} "):
        own._call(own._client.PushMessages, request)
    assert own.receive() is None


@pytest.mark.parametrize(
    ("which", "off", "said"),
    [
        (0, -900, r"signed 9\d\d s behind the SuperLink's clock"),
        (1, 400, r"signed [34]\d\d s ahead of the SuperLink's clock"),
    ],
)
def test_a_node_whose_clock_is_off_is_told_by_how_much(deployment, fleets, which, off, said):
    fleet = fleets[which]
    signer = fleet._client._interceptors[-1]
    clock, signer._clock = signer._clock, lambda: (time.time_ns() + off * 10**9) // 1000
    with pytest.raises(LinkRefused, match=f"{said}, which says .*: set the clock that is wrong"):
        fleet.receive()
    signer._clock = clock
    assert fleet.receive() is None
    # And so is the coordinator's operator.
    assert re.search(said, (deployment.run_directory / "logs" / "superlink.log").read_text())


def test_more_connections_than_one_address_may_hold_are_ended(deployment):
    held = lorises(deployment, Limits().strangers_by_address + 20)
    ended = 0
    for one in held[:20]:
        try:
            ended += one.recv(100) == b""
        except (ConnectionError, ssl.SSLError):
            ended += 1
    for one in held:
        one.close()
    assert ended == 20
