"""What monitoring may see, by the ASGI calls of the doors and without a network."""

import asyncio
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics
from server.superlink import admin_door, public_door

TOKEN = b"correct-horse"


async def application(scope, _receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def fetched(door, path, *, token=b"", method="GET"):
    """Status and body."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    headers = [(b"authorization", b"Bearer " + token)]
    asyncio.run(door({"type": "http", "path": path, "method": method, "headers": headers}, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def figures(metrics):
    """Every sample by name and labels, as Prometheus itself would read it."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
    }


@pytest.fixture
def progress(tmp_path):
    return tmp_path / "progress.jsonl"


@pytest.fixture
def metrics(progress):
    return Metrics(progress)


def test_the_page_is_behind_the_admin_token_and_nowhere_else(metrics):
    admin = admin_door(metrics.served(application), TOKEN)
    assert fetched(admin, "/metrics")[0] == 401
    status, body = fetched(admin, "/metrics", token=TOKEN)
    assert status == 200
    assert b"process_resident_memory_bytes" in body
    assert fetched(public_door(application), "/metrics", token=TOKEN)[0] == 404


def test_requests_are_counted_by_listener_interface_and_status(metrics):
    public = metrics.counted(public_door(application), listener="public")
    for path in ("/health", "/health", "/v1/fleet/pull-messages", "/v1/control/start-run"):
        fetched(public, path)
    counted = {name[1:]: value for name, value in figures(metrics).items() if name[0] == "fedgrade_requests_total"}
    assert counted == {
        ("/health", "public", "200"): 2, ("/v1/fleet/", "public", "200"): 1, ("/v1/control/", "public", "404"): 1,
    }  # fmt: skip


def test_strangers_paths_make_no_figures_of_their_own(metrics):
    public = metrics.counted(public_door(application), listener="public")
    for number in range(100):
        fetched(public, f"/{number}/\u20ac\n")
    counted = [name for name in figures(metrics) if name[0] == "fedgrade_requests_total"]
    assert counted == [("fedgrade_requests_total", "other", "public", "404")]


def test_a_request_that_breaks_off_is_counted(metrics):
    async def broken(_scope, _receive, _send):
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        fetched(metrics.counted(broken, listener="public"), "/health")
    assert figures(metrics)["fedgrade_requests_total", "/health", "public", "none"] == 1


def test_progress_is_that_of_the_last_finished_stage(metrics, progress):
    assert figures(metrics)["fedgrade_run_stage",] == 0
    lines = [{"stage": number, "stages": 62, "purpose": "train", "answered": 5, "participants": 5} for number in (1, 2)]
    progress.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = figures(metrics)
    assert (found["fedgrade_run_stage",], found["fedgrade_run_stages",]) == (2, 62)
    assert found["fedgrade_run_answered",] == found["fedgrade_run_participants",] == 5


@pytest.mark.parametrize("text", ["", "{", '{"stage": "two"}\n', '{"stage": 2}\n{"sta', "\x00\n"])
def test_half_a_line_of_progress_breaks_nothing(metrics, progress, text):
    progress.write_text(text)
    assert figures(metrics)["fedgrade_run_stage",] == 0
