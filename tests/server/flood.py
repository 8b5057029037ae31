"""Strangers, and a thief with a caught request, against the public port of a real SuperLink."""

import asyncio
import base64
import itertools
import secrets
import socket
import ssl
import threading
import time
from collections import Counter
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from clients.fleet import FleetAccess, FleetConnection, LinkDown
from clients.node_key import load_node_key
from fedgrade.trust.request_signature import NO_SESSION, RequestClaim, sign

PULL = "/v1/fleet/pull-messages"
ANSWERS = 20


def connection(deployment, key):
    return FleetConnection(
        FleetAccess(
            address=deployment.address,
            root_certificate=deployment.authority.read_bytes(),
            key=load_node_key(key),
            max_message_bytes=100_000,
            heartbeat_seconds=30.0,
        )
    )


class Caught:
    """What a thief behind a proxy would have of a request that went through."""

    def __init__(self, fleet):
        seen = []
        fleet._client._client.event_hooks["request"] = [seen.append]
        fleet.receive()
        fleet._client._client.event_hooks["request"] = []
        self.request = seen[-1]
        assert self.request.url.path == PULL

    def raw(self, *, path=PULL, body=None, **headers):
        kept = {name: value for name, value in self.request.headers.items() if name.startswith(("flwr", "fedgrade"))}
        kept |= {"content-type": "application/protobuf"} | headers
        return post(path, self.request.content if body is None else body, kept)


class Asking(threading.Thread):
    """An enrolled node that goes on asking; how often it was answered, and the first thing that went wrong.

    A question that is not answered in time is asked again, as a node does: this machine may have stood still.
    """

    def __init__(self, fleet):
        super().__init__(daemon=True)
        self.fleet, self.answers, self.late, self.failure = fleet, 0, 0, None
        self._stop_now = threading.Event()

    def run(self):
        while not self._stop_now.wait(0.02):
            try:
                # A question for messages is held for up to a second; a heartbeat is answered at once.
                self.fleet.receive() if self.answers % 10 == 0 else self.fleet.heartbeat()
            except LinkDown as error:
                self.late += 1
                if self.late > ANSWERS // 10:
                    self.failure = error
                    return
                continue
            except Exception as error:  # noqa: BLE001 - the test says which
                self.failure = error
                return
            self.answers += 1

    def end(self):
        self._stop_now.set()
        self.join(60.0)


def post(path, body, headers):
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def bad_requests(caught):
    """For ever: other paths, no signature, garbage, an unknown key, another session, a replay, another body."""
    stranger = ec.generate_private_key(ec.SECP384R1())
    pem = base64.b64encode(public_key_to_bytes(stranger.public_key())).decode()
    body = PullMessagesRequest(node=Node(node_id=1)).SerializeToString()
    own = {
        "flwr-public-key": pem,
        "fedgrade-signature": sign(
            RequestClaim(
                method="POST",
                path=PULL,
                body_digest="0" * 64,
                session=NO_SESSION,
                nonce=secrets.token_hex(16),
                time=time.time_ns() // 1000,
            ),
            stranger,
        ),
    }
    replay = caught.raw()
    yield from itertools.cycle(
        [
            (404, b"GET /v1/control/start-run HTTP/1.1\r\nhost: x\r\n\r\n"),
            (404, post("/v1/runtime/acquire-task", b"", {})),
            (404, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"),
            (401, post(PULL, body, {})),
            (400, post(PULL, body, own | {"fedgrade-signature": "garbage"})),
            (401, post(PULL, body, own)),
            (401, replay),
            (401, caught.raw(path="/v1/fleet/push-object")),
            (401, caught.raw(body=b"x" * len(caught.request.content))),
            (401, caught.raw(**{"flwr-public-key": pem})),
            (400, post(PULL + "?x", body, own)),
            (401, b"DELETE /health HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"),
        ]
    )


# These end their connection, and cost a new one: fewer of them.
EXPENSIVE = [
    (413, b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n"),
    (413, b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"),
    (400, b"\0\1\2 garbage\r\n\r\n"),
    (400, b"POST /v1/fleet/push-object HTTP/1.1\r\n" + b"x: y\r\n" * 20_000),
]


async def flood(deployment, requests, *, lanes):
    """Send ``requests``, each an expected status and bytes, over ``lanes`` connections; how often what came of them."""
    context = ssl.create_default_context(cafile=str(deployment.authority))
    host, _, port = deployment.address.rpartition(":")
    queue, found = iter(requests), Counter()

    async def lane():
        streams = None
        for expected, raw in queue:
            if streams is None:
                streams = await asyncio.open_connection(host, int(port), ssl=context)
            reader, writer = streams
            try:
                writer.write(raw)
                status, ends = await answer(reader)
            except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                status, ends = None, True
            found[expected, status] += 1
            if ends:
                writer.transport.abort()
                streams = None
        if streams is not None:
            streams[1].transport.abort()

    await asyncio.gather(*(lane() for _ in range(lanes)))
    return found


async def answer(reader):
    """Status of the next answer, and whether the connection ends with it."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head.split(b" ")[1]), b"connection: close" in head


def lorises(deployment, count):
    """Connections that begin a request, or TLS, and never end it; the oldest first."""
    context = ssl.create_default_context(cafile=str(deployment.authority))
    host, _, port = deployment.address.rpartition(":")

    def one(number):
        connection = socket.create_connection((host, int(port)), 60.0)
        if number % 8 == 0:
            connection = context.wrap_socket(connection, server_hostname=host)
            connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nx: ")
        return connection

    return [one(number) for number in range(count)]


def withstand(deployment, own, caught, *, lorises_held, requests):
    """Flood the public port while the node ``own`` asks: how it fared, what came of the flood, bytes of memory more.

    The flood has ``requests`` requests and goes on until the node was answered ``ANSWERS`` times or failed.
    """
    process = deployment.process("superlink").pid
    asyncio.run(flood(deployment, itertools.islice(bad_requests(caught), 300), lanes=8))
    before = resident_bytes(process)
    held, node = lorises(deployment, lorises_held), Asking(own)
    node.start()
    dear, cheap = itertools.islice(itertools.cycle(EXPENSIVE), 20), bad_requests(caught)
    first = itertools.chain(itertools.islice(cheap, requests - 20), dear)
    rest = itertools.takewhile(lambda _: node.failure is None and node.answers < ANSWERS, cheap)
    found = asyncio.run(flood(deployment, itertools.chain(first, rest), lanes=8))
    node.end()
    for one in held:
        one.close()
    return node, found, resident_bytes(process) - before


def resident_bytes(process):
    (line,) = [one for one in Path(f"/proc/{process}/status").read_text().splitlines() if one.startswith("VmRSS")]
    return int(line.split()[1]) * 1024
