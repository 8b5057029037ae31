"""A listener on the open network, with limits that a test can wait for; no Flower behind it."""

import asyncio
import contextlib
import itertools
import socket
import ssl
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import pytest
import uvicorn

from server.certificates import certify
from server.connections import PLACE, Limits, Place, Watch, origin
from server.listener import GuardedServer
from server.slices import SLICE_BYTES

pytestmark = pytest.mark.flower

LIMITS = Limits(
    handshake_seconds=0.6,
    header_seconds=0.4,
    header_bytes=2000,
    reading_seconds=1.5,
    strangers=12,
    strangers_by_address=8,
    connections_by_key=3,
    connections=64,
)
PATIENCE = 20.0
LONG = 128  # pieces of 256 KB, more than sockets hold
ASK = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi"


class Listening:
    """A guarded server in a thread; ``hold`` keeps its answers back."""

    def __init__(self, files):
        self.watch, self.hold, self.files = Watch(LIMITS), threading.Event(), files
        self.hold.set()
        free = socket.socket()
        free.bind(("127.0.0.1", 0))
        self.port = free.getsockname()[1]
        free.close()
        config = uvicorn.Config(
            self.application,
            interface="asgi3",
            host="0.0.0.0",  # noqa: S104 - all of 127.0.0.0/8 is wanted
            port=self.port,
            lifespan="off",
            ws="none",
            log_level="error",
            ssl_keyfile=str(files.key),
            ssl_certfile=str(files.certificate),
        )
        self.server = GuardedServer(config, self.watch)
        loop = config.get_loop_factory()
        self._thread = threading.Thread(target=self._serve, args=(loop,), daemon=True)
        self._thread.start()

    def _serve(self, loop):
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(self.server.serve())

    async def application(self, scope, receive, send):
        await receive()
        await asyncio.to_thread(self.hold.wait)
        if (b"key", b"known") in scope["headers"]:
            self.watch.know(scope["state"][PLACE], b"key")
        pieces = LONG if (b"long", b"yes") in scope["headers"] else 0
        length = str(pieces * SLICE_BYTES + 2).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        for _ in range(pieces - 1):
            await send({"type": "http.response.body", "body": bytes(SLICE_BYTES), "more_body": True})
        await send({"type": "http.response.body", "body": bytes(SLICE_BYTES if pieces else 0) + b"ok"})

    def raw(self, host="127.0.0.1", *, source=0):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.settimeout(PATIENCE)
        connection.bind(("127.0.0.1", source))
        connection.connect((host, self.port))
        return connection

    def tls(self, host="127.0.0.1", *, source=0):
        context = ssl.create_default_context(cafile=str(self.files.authority))
        return context.wrap_socket(self.raw(host, source=source), server_hostname="127.0.0.1")

    def end(self):
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return certify(tmp_path_factory.mktemp("tls"), [], now=datetime.now(UTC))


@pytest.fixture(scope="module")
def listening(files):
    running = Listening(files)
    while not running.server.started:
        assert running._thread.is_alive()
    yield running
    running.hold.set()
    running.end()


def ended(connection):
    """Whether the other side ends the connection; waits for it."""
    try:
        while connection.recv(4096):
            pass
    except (ConnectionError, ssl.SSLError):
        return True
    except TimeoutError:
        return False
    finally:
        connection.close()
    return True


def answered(connection, request=ASK):
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        connection.sendall(request)
        said = b""
        while not said.endswith(b"\r\n\r\nok"):
            part = connection.recv(4096)
            if not part:
                return False
            said += part
        return said.startswith(b"HTTP/1.1 200")
    return False


def test_a_whole_request_is_answered_and_so_is_the_next_one(listening):
    with listening.tls() as connection:
        assert answered(connection)
        assert answered(connection)


def test_a_header_that_never_ends_is_given_up(listening):
    connections = [listening.tls() for _ in range(3)]
    for connection, said in zip(connections, (b"", b"P", b"POST / HTTP/1.1\r\nhost: x\r\n"), strict=True):
        connection.sendall(said)
    assert all(ended(connection) for connection in connections)


def test_a_header_that_drips_is_given_up(listening):
    connection = listening.tls()
    stop = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                connection.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        assert ended(connection)
    finally:
        stop.set()
        dripping.join()


def test_who_never_speaks_tls_is_given_up(listening):
    connections = [listening.raw() for _ in range(4)]
    for connection, said in zip(
        connections, (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 600), strict=True
    ):
        connection.sendall(said)
    assert all(ended(connection) for connection in connections)


def test_two_connections_from_one_port_to_two_of_our_addresses_are_both_given_up(listening):
    connections = [listening.tls()]
    connections.append(listening.tls("127.0.0.2", source=connections[0].getsockname()[1]))
    for connection in connections:
        connection.sendall(b"POST / HTTP/1.1\r\nx: ")
    assert connections[0].getsockname() == connections[1].getsockname()
    assert all(ended(connection) for connection in connections)


def test_who_shares_a_port_with_a_known_one_stays_a_stranger():
    watch = Watch(LIMITS)
    first, second = Place(("192.0.2.1", 7)), Place(("192.0.2.1", 7))
    for place in (first, second):
        assert watch.admit(place, 0.0)
    watch.know(second, b"key")
    assert (first.key, second.key, len(watch)) == (b"", b"key", 2)
    watch.leave(second)
    assert list(watch._strangers) == [first]
    assert not watch._by_key


def test_a_connection_that_is_quiet_after_an_answer_is_given_up(listening):
    connection = listening.tls()
    assert answered(connection)
    assert ended(connection)


def test_an_answer_may_take_its_time(listening):
    listening.hold.clear()
    with listening.tls() as connection:
        connection.sendall(ASK)
        threading.Timer(3 * LIMITS.header_seconds, listening.hold.set).start()
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_who_does_not_read_an_answer_is_given_up(listening):
    with listening.tls() as connection:
        connection.sendall(ASK.replace(b"\r\n\r\n", b"\r\nlong: yes\r\n\r\n"))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        while len(listening.watch):
            time.sleep(0.05)
        assert received(connection) < LONG * SLICE_BYTES
    while listening.server.server_state.tasks:
        time.sleep(0.05)


def test_an_answer_that_is_read_slowly_comes_whole(listening):
    with listening.tls() as connection:
        connection.sendall(ASK.replace(b"\r\n\r\n", b"\r\nlong: yes\r\n\r\n"))
        assert received(connection, pause=0.001) > LONG * SLICE_BYTES


def received(connection, *, pause=0.0):
    """Bytes of an answer until it or the connection ends."""
    found, last = 0, b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while not last.endswith(b"ok"):
            last = connection.recv(65536)
            if not last:
                break
            found += len(last)
            time.sleep(pause)
    return found


def test_a_header_without_end_takes_no_memory(listening):
    connection = listening.tls()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        connection.sendall(b"POST / HTTP/1.1\r\n" + b"x: y\r\n" * 1000)
        connection.sendall(b"x: y\r\n" * 1000)
    assert ended(connection)


def test_requests_in_a_heap_are_not_taken(listening):
    listening.hold.clear()
    connection = listening.tls()
    threading.Timer(0.2, listening.hold.set).start()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        connection.sendall(ASK * 20)
    assert ended(connection)


def test_the_next_request_may_come_before_the_end_of_an_answer_is_noted(listening):
    # As flwr's layers send it: all of the body first, and its end in a message of its own.
    listening.hold.clear()
    with listening.tls() as connection:
        connection.sendall(ASK + ASK)
        listening.hold.set()
        said = b""
        while said.count(b"HTTP/1.1 200") < 2:
            part = connection.recv(4096)
            assert part
            said += part


def test_strangers_make_room_for_whoever_comes_and_says_at_once_what_it_wants(listening):
    held = [listening.raw() for _ in range(40)]
    with listening.tls() as connection:
        assert answered(connection)
    assert sum(1 for one in held[:-9] if ended(one)) == 31
    for one in held[-9:]:
        one.close()


def test_who_is_known_is_not_crowded_out(listening):
    with listening.tls() as connection:
        known = ASK.replace(b"\r\n\r\n", b"\r\nkey: known\r\n\r\n")
        assert answered(connection, known)
        held = [listening.raw() for _ in range(40)]
        assert answered(connection, known)
        for one in held:
            one.close()


def test_one_key_does_not_hold_all_places(listening):
    known = ASK.replace(b"\r\n\r\n", b"\r\nkey: known\r\n\r\n")
    connections = [listening.tls() for _ in range(5)]
    assert all(answered(connection, known) for connection in connections)
    assert [answered(connection, known) for connection in connections] == [False, False, True, True, True]
    for connection in connections:
        connection.close()


def test_nothing_is_left_of_connections_that_ended(listening):
    for _ in range(3):
        with listening.tls() as connection:
            assert answered(connection)
        ended(listening.raw())
    while len(listening.watch):
        time.sleep(0.05)
    assert not listening.watch._by_origin
    assert not listening.watch._by_key


def test_all_of_one_customers_addresses_count_as_one():
    assert origin("2001:db8:1:2::1") == origin("2001:db8:1:2:ffff::9") != origin("2001:db8:1:3::1")
    assert origin("192.0.2.1") == origin("::ffff:192.0.2.1") != origin("192.0.2.2")
    assert origin("fe80::1%eth0")


def test_there_is_a_bound_for_all_addresses_together():
    watch, closed = Watch(LIMITS), []
    for number in range(100):
        place = Place((f"192.0.2.{number}", 1))
        place.give_up = partial(closed.append, number)
        assert watch.admit(place, 0.0)
    assert closed == list(range(100 - LIMITS.strangers))
    assert len(watch) == LIMITS.strangers


def test_one_address_begins_so_many_connections_a_second_and_others_are_not_kept_by_it():
    watch, ports = Watch(replace(LIMITS, new_at_once=5, new_a_second=2.0)), itertools.count()

    def begin(now, host="192.0.2.1"):
        place = Place((host, next(ports)))
        admitted = watch.admit(place, now)
        watch.leave(place)
        return admitted

    assert [begin(0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert begin(0.0, "192.0.2.2")
    assert [begin(1.0) for _ in range(3)] == [True, True, False]
    watch.look(10.0)
    assert not watch._begun
    assert begin(10.0)


def test_an_address_that_is_taken_ends_the_process(listening, files):
    other = GuardedServer(
        uvicorn.Config(
            listening.application, host="127.0.0.1", port=listening.port, lifespan="off", ssl_certfile=files.certificate
        ),
        Watch(),
    )
    other.config.load = lambda: None
    with pytest.raises(SystemExit):
        asyncio.run(start(other))


async def start(server):
    server.lifespan = uvicorn.lifespan.off.LifespanOff(server.config)
    await server.startup()
