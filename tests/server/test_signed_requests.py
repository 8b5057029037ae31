"""The inner door of the public listener, by its ASGI calls and without a network."""

import asyncio
import base64
import hashlib
import json
import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedgrade.trust.request_signature import NO_SESSION, SESSION_HEADER, WINDOW_SECONDS, RequestClaim, sign
from server.connections import PLACE
from server.enrolled_keys import EnrolledKeys
from server.signed_requests import MAX_REQUEST_BYTES, Allowance, SignedRequests

KEY, STRANGER = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
PATH, BODY, NOW = "/v1/fleet/pull-messages", b"a request", 1_795_262_400.0


def pem(key):
    return public_key_to_bytes(key.public_key())


class Door:
    """A door with one enrolled key, a clock that a test turns, and what came through."""

    def __init__(self, **allowance):
        self.now, self.through, self.enrolled, self.known = NOW, [], [pem(KEY)], []
        self.reads, self.mono = 0, 0.0
        keys = EnrolledKeys(self._read, clock=lambda: self.mono)
        self.door = SignedRequests(
            self._application,
            keys,
            clock=lambda: self.now,
            allowance=Allowance(**allowance),
            on_known=lambda place, key: self.known.append((place, key)),
        )

    def _read(self):
        self.reads += 1
        return list(self.enrolled)

    async def _application(self, scope, receive, send):
        body = await receive() if scope["method"] == "POST" else {"body": b""}
        self.through.append(body["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def header(self, *, key=KEY, method="POST", path=PATH, body=BODY, session=None, nonce=None, off=0.0):
        claim = RequestClaim(
            method=method,
            path=path,
            body_digest=hashlib.sha256(body).hexdigest(),
            session=self.door.session if session is None else session,
            nonce=nonce or secrets.token_hex(16),
            time=int((self.now + off) * 1e6),
        )
        return sign(claim, key).encode()

    def headers(self, *, key=KEY, **claim):
        return [
            (b"content-length", str(len(BODY)).encode()),
            (b"flwr-public-key", base64.b64encode(pem(key))),
            (b"fedgrade-signature", self.header(key=key, **claim)),
        ]

    def ask(self, headers=None, *, body=BODY, path=PATH, method="POST", query=b"", receive=None):
        """Status, what the refusal says, and whether a byte of the body was read."""
        return asyncio.run(self.asked(headers, body=body, path=path, method=method, query=query, receive=receive))

    async def asked(self, headers=None, *, body=BODY, path=PATH, method="POST", query=b"", receive=None):
        sent, read = [], []
        scope = {
            "type": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "state": {PLACE: "its connection"},
            "method": method,
            "headers": self.headers() if headers is None else headers,
        }

        async def whole():
            return {"type": "http.request", "body": body, "more_body": False}

        async def noted():
            read.append(True)
            return await (receive or whole)()

        async def send(message):
            sent.append(message)

        await self.door(scope, noted, send)
        start, end = sent
        said = json.loads(end["body"] or "{}").get("detail", "")
        self.told = dict(start["headers"])
        return start["status"], said, bool(read)


@pytest.fixture
def door():
    return Door()


def test_a_signed_request_comes_through_as_it_was_sent(door):
    assert door.ask()[0] == 200
    assert door.through == [BODY]
    assert door.known == [("its connection", pem(KEY))]


def test_health_needs_no_signature(door):
    assert door.ask([], path="/health", method="GET")[0] == 200
    assert door.through == []
    assert door.ask([], path="/health", method="POST")[0] == 413


@pytest.mark.parametrize(
    ("claim", "status", "said"),
    [
        ({"key": STRANGER}, 401, "not enrolled"),
        ({"session": NO_SESSION}, 401, "session"),
        ({"session": "ab" * 16}, 401, "session"),
        ({"method": "GET"}, 401, "not this node key's"),
        ({"path": "/v1/fleet/push-object"}, 401, "not this node key's"),
        ({"off": WINDOW_SECONDS + 5}, 401, "signed 305 s ahead of the SuperLink's clock"),
        ({"off": -WINDOW_SECONDS - 5}, 401, "signed 305 s behind the SuperLink's clock"),
    ],
)
def test_what_does_not_hold_is_refused_before_a_byte_of_the_body_is_read(door, claim, status, said):
    found, reason, read = door.ask(door.headers(**claim))
    assert (found, read) == (status, False)
    assert said in reason
    assert door.told[SESSION_HEADER.encode()] == door.door.session.encode()
    assert b"connection" not in door.told
    assert door.through == []


def test_a_key_does_not_vouch_with_anothers_signature(door):
    headers = dict(door.headers())
    headers[b"fedgrade-signature"] = door.header(key=STRANGER)
    assert door.ask(list(headers.items()))[::2] == (401, False)


@pytest.mark.parametrize("name", [b"flwr-public-key", b"fedgrade-signature", b"content-length"])
def test_a_header_that_stands_there_twice_is_refused(door, name):
    # Whoever reads the first would hear another key than whoever reads the last.
    headers = door.headers()
    assert door.ask([(name, b"x"), *headers]) == (400, f"header {name.decode()}: stands there twice", False)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({b"content-length": str(MAX_REQUEST_BYTES + 1).encode()}, 413),
        ({b"content-length": b"-1"}, 413),
        ({b"content-length": b""}, 413),
        ({b"transfer-encoding": b"chunked"}, 413),
        ({b"fedgrade-signature": b"garbage"}, 400),
        ({b"fedgrade-signature": b"\xff"}, 400),
        ({b"flwr-public-key": b"not base64"}, 400),
        ({b"flwr-public-key": b"A" * 4000}, 401),
        ({b"flwr-public-key": b""}, 401),
    ],
)
def test_headers_that_make_no_sense_are_refused(door, changes, status):
    assert door.ask(list({**dict(door.headers()), **changes}.items()))[::2] == (status, False)


def test_a_large_body_that_is_not_read_ends_the_connection(door):
    headers = dict(door.headers(session=NO_SESSION)) | {b"content-length": b"1000000"}
    assert door.ask(list(headers.items()))[::2] == (401, False)
    assert door.told[b"connection"] == b"close"


def test_a_request_without_a_signature_says_what_is_missing(door):
    status, said, read = door.ask(door.headers()[:2])
    assert (status, read) == (401, False)
    assert "an older fedgrade signs none" in said


def test_a_path_has_one_spelling(door):
    assert door.ask(query=b"x=1")[0] == 400
    assert door.ask(path="/v1/fleet/pull%2dmessages")[0] == 400


@pytest.mark.parametrize("body", [b"", b"a requesT", BODY + b"!", BODY[:-1]])
def test_another_body_than_the_signed_one_never_reaches_the_application(door, body):
    status, said, read = door.ask(body=body)
    assert (status, read) == (401, True)
    assert "not the one that was signed" in said
    assert door.through == []


def test_a_request_is_taken_once(door):
    headers = door.headers()
    assert door.ask(headers)[0] == 200
    assert door.ask(headers) == (401, "this very request was made before", False)
    nonce = secrets.token_hex(16)
    assert door.ask(door.headers(nonce=nonce))[0] == 200
    assert door.ask(door.headers(nonce=nonce, off=1.0))[0] == 401


def test_a_request_stays_refused_until_its_time_no_longer_passes(door):
    headers = door.headers()
    assert door.ask(headers)[0] == 200
    for seconds in (60, 120, 180, 240, 300, 301, 330, 400):
        door.now = NOW + seconds
        door.ask()
        assert door.ask(headers)[0] == 401
    assert sum(map(len, door.door._askers[pem(KEY)].nonces.values())) < 9


def test_a_clock_that_was_set_back_opens_no_door_for_replays(door):
    headers = door.headers()
    assert door.ask(headers)[0] == 200
    door.now = NOW + 2 * WINDOW_SECONDS
    assert door.ask()[0] == 200
    door.now = NOW
    assert "clock was set back" in door.ask(headers)[1]


def test_after_a_restart_nothing_that_was_signed_before_is_let_pass(door):
    headers, again = door.headers(), Door()
    assert again.ask(headers)[0] == 401
    assert again.ask(again.headers())[0] == 200


def test_what_is_remembered_of_a_key_is_bounded():
    door = Door(requests=10)
    assert [door.ask()[0] for _ in range(11)] == [200] * 10 + [429]
    assert "over 10 requests" in door.ask()[1]
    door.now += WINDOW_SECONDS + 60
    assert door.ask()[0] == 200


def test_a_stranger_leaves_nothing_in_memory(door):
    for _ in range(20):
        door.ask(door.headers(key=ec.generate_private_key(ec.SECP256R1())))
        door.ask(door.headers(session=NO_SESSION))
    assert not door.door._askers
    assert not door.door._told


def test_bodies_under_way_are_bounded_for_each_key():
    async def both(door):
        waiting, go = asyncio.Event(), asyncio.Event()

        async def slowly():
            waiting.set()
            await go.wait()
            return {"type": "http.request", "body": BODY, "more_body": False}

        first = asyncio.create_task(door.asked(receive=slowly))
        await waiting.wait()
        second = await door.asked()
        go.set()
        return (await first)[0], second

    door = Door(bytes_at_once=len(BODY) + 3)
    first, (status, said, read) = asyncio.run(both(door))
    assert (first, status, read) == (200, 429, False)
    assert "under way" in said
    assert door.ask()[0] == 200


def test_answers_under_way_are_bounded_for_each_key():
    async def many(door):
        go = asyncio.Event()

        async def held(_scope, receive, send):
            await receive()
            await go.wait()
            await door._application({"method": "GET"}, receive, send)

        door.door._application = held
        door.enrolled.append(pem(STRANGER))
        asked = [asyncio.create_task(door.asked()) for _ in range(5)]
        other = asyncio.create_task(door.asked(door.headers(key=STRANGER)))
        refused, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        go.set()
        return [(await task)[0] for task in (*asked, other)], [task.result() for task in refused]

    door = Door(answers_at_once=4)
    statuses, refused = asyncio.run(many(door))
    assert sorted(statuses[:5]) == [200] * 4 + [429]
    assert refused == [(429, "4 answers to this node key are under way; read them", True)]
    assert statuses[5] == 200
    assert {asker.answers_now for asker in door.door._askers.values()} == {0}


def test_a_body_that_stalls_is_given_up():
    async def never():
        await asyncio.Event().wait()

    status, said, _ = Door(stall_seconds=0.01).ask(receive=never)
    assert (status, said) == (408, "0 of 9 bytes came in time")


def test_a_body_that_drips_is_given_up():
    async def drip():
        await asyncio.sleep(0.005)
        return {"type": "http.request", "body": b"", "more_body": True}

    assert Door(stall_seconds=0.02, bytes_a_second=10**9).ask(receive=drip)[0] == 408


def test_a_connection_that_ends_within_the_body_is_noted(door):
    async def gone():
        return {"type": "http.disconnect"}

    assert door.ask(receive=gone)[0] == 400
    assert door.ask()[0] == 200


def test_a_key_counts_as_soon_as_it_is_enrolled_and_no_longer_than_it_is(door):
    stranger = door.headers(key=STRANGER)
    assert door.ask(stranger)[0] == 401
    door.enrolled.append(pem(STRANGER))
    door.mono += 0.1
    assert door.ask(stranger)[0] == 200
    door.enrolled.remove(pem(STRANGER))
    door.mono += 1.1
    assert door.ask(door.headers(key=STRANGER))[0] == 401
    assert door.door._askers.keys() <= {pem(KEY)}


def test_strangers_have_the_keys_read_a_few_times_at_most_and_a_newcomer_is_not_turned_away(door):
    async def many():
        strangers = [door.asked(door.headers(key=STRANGER)) for _ in range(200)]
        return await asyncio.gather(door.asked(), *strangers)

    own, *others = asyncio.run(many())
    assert own[0] == 200
    assert {status for status, *_ in others} == {401}
    assert door.reads <= 3
    door.enrolled.append(pem(STRANGER))
    door.mono += 0.001
    assert door.ask(door.headers(key=STRANGER))[0] == 200


def test_an_enrolled_key_that_is_refused_is_logged_once_and_a_stranger_never(door, caplog):
    for _ in range(3):
        door.ask(door.headers(off=WINDOW_SECONDS + 60))
        door.ask(door.headers(key=STRANGER))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "server.signed_requests"]
    assert "signed 360 s ahead" in line
