"""The SuperLink's process, started as it is in earnest: what it logs, and how it ends when it cannot listen."""

import json
import re

import pytest

from fedgrade.logs import FORMAT
from server.deployment import Deployment

pytestmark = pytest.mark.flower


def test_every_line_of_its_log_is_json_where_the_environment_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv(FORMAT, "json")
    with Deployment(tmp_path) as deployment:
        deployment.control.online()
    lines = (tmp_path / "logs" / "superlink.log").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    assert ("INFO", "flwr", "ControlServicer.ListNodes") in [
        (one["level"], one["logger"], one["message"]) for one in said
    ]
    assert {one["logger"] for one in said} == {"flwr"}


def test_its_log_is_plain_text_without_colours_otherwise(tmp_path):
    with Deployment(tmp_path) as deployment:
        deployment.control.online()
    text = (tmp_path / "logs" / "superlink.log").read_text()
    assert re.search(r"^2\S+ \S+ INFO ControlServicer\.ListNodes$", text, re.MULTILINE)
    assert "\x1b" not in text
