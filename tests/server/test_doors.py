"""The two listeners' doors, by their ASGI calls and without a network."""

import asyncio

import pytest

from server.signed_requests import MAX_REQUEST_BYTES
from server.superlink import admin_door, public_door

TOKEN = b"correct-horse"


async def application(scope, _receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def status(door, path, *, method="POST", headers=None, kind="http"):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    given = [(b"content-length", b"10")] if headers is None else headers
    asyncio.run(door({"type": kind, "path": path, "method": method, "headers": given}, receive, send))
    return sent[0].get("status", sent[0]["type"])


@pytest.mark.parametrize("path", ["/health", "/v1/fleet/pull-messages"])
def test_partners_reach_health_and_fleet(path):
    assert status(public_door(application), path) == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/healthy",
        "/health/",
        "/v1/fleet",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "//v1/fleet/pull-messages",
        "/v1/Fleet/pull-messages",
        "/V1/fleet/",
    ],
)
def test_partners_reach_nothing_else(path):
    assert status(public_door(application), path) == 404


@pytest.mark.parametrize("length", [None, b"", b"-1", b"1e3", str(MAX_REQUEST_BYTES + 1).encode(), b"9" * 5000])
def test_a_body_without_a_bounded_length_is_not_read(length):
    headers = [] if length is None else [(b"content-length", length)]
    assert status(public_door(application), "/v1/fleet/push-object", headers=headers) == 413


def test_a_get_needs_no_length():
    assert status(public_door(application), "/health", method="GET", headers=[]) == 200


@pytest.mark.parametrize(
    "given", [None, b"", b"Bearer ", b"Bearer wrong", TOKEN, b"bearer " + TOKEN, b"Bearer " + TOKEN + b"x"]
)
@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/fleet/pull-messages", "/docs", "/"])
def test_the_admin_listener_wants_the_token(path, given):
    headers = [] if given is None else [(b"authorization", given)]
    assert status(admin_door(application, TOKEN), path, headers=headers) == 401


def test_the_token_opens_the_admin_listener():
    headers = [(b"authorization", b"Bearer " + TOKEN)]
    assert status(admin_door(application, TOKEN), "/v1/control/start-run", headers=headers) == 200


def test_runs_authenticate_themselves():
    assert status(admin_door(application, TOKEN), "/v1/runtime/acquire-task", headers=[]) == 200


@pytest.mark.parametrize("door", [public_door(application), admin_door(application, TOKEN)])
def test_websockets_are_closed(door):
    assert status(door, "/v1/fleet/x", kind="websocket") == "websocket.close"
