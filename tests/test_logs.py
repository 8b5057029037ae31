"""Lines for people, and JSON for machines."""

import json
import logging
import subprocess
import sys

import pytest

from fedgrade.errors import DocumentRefused
from fedgrade.logs import FORMAT, JsonLines, configure_logs


def logged(**fields):
    record = logging.LogRecord("fedgrade.site", logging.WARNING, __file__, 1, "site %s: %s", ("a", "said\nno"), None)
    for name, value in fields.items():
        setattr(record, name, value)
    return JsonLines().format(record)


def test_a_record_is_one_object_on_one_line():
    line = logged(created=1_800_000_000.5)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2027-01-15T08:00:00.500+00:00", "level": "WARNING", "logger": "fedgrade.site",
        "message": "site a: said\nno",
    }  # fmt: skip


def test_an_exception_is_named_and_traced():
    try:
        int("inner")
    except ValueError:
        entry = json.loads(logged(exc_info=sys.exc_info()))
    assert entry["exception"] == "ValueError"
    assert "inner" in entry["trace"]


def test_a_whole_process_logs_json_where_the_environment_asks_for_it():
    script = (
        "import logging; from fedgrade.logs import configure_logs; configure_logs(20); logging.info('%d stages', 3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={FORMAT: "json"}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stderr)["message"] == "3 stages"


def test_a_format_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv(FORMAT, "xml")
    with pytest.raises(DocumentRefused, match="FEDGRADE_LOG_FORMAT='xml': must be text or json"):
        configure_logs(logging.INFO)
