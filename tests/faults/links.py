"""The wire of bad_link.py, as tests use it: how bad it is, and what runs at its far end."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.bad_link import FAR_DEVICE, NEAR_DEVICE

GOOD = {"loss": 0.0, "delay": 0.0, "jitter": 0.0, "cut": False}


class Link:
    """A wire that is up; ``where`` is the start of a command that runs something at its far end."""

    def __init__(self, settings):
        self._settings, self.where = settings, ()

    def be(self, **settings):
        """As good as GOOD from now on, but for ``settings``."""
        # Never half-written: it is read by another process.
        new = self._settings.with_suffix(".new")
        new.write_text(json.dumps({**GOOD, **settings}))
        new.replace(self._settings)


@contextmanager
def bad_link(folder):
    """A wire, good to begin with, and gone with its devices in the end; skips where a user cannot have one."""
    link = Link(folder / "wire.json")
    link.be()
    program = [sys.executable, str(Path(__file__).with_name("bad_link.py")), str(folder / "wire.json")]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as wire:
        number = wire.stdout.readline().strip()
        if not number:
            pytest.skip(f"no network of one's own without root and TUN: {wire.stderr.read().decode()[-200:]}")
        link.where = ("nsenter", f"--net=/proc/{int(number)}/ns/net")
        yield link
        wire.stdin.close()
    assert wire.returncode == 0
    links = subprocess.run(["ip", "-oneline", "link"], capture_output=True, text=True, check=True).stdout
    assert NEAR_DEVICE not in links
    assert FAR_DEVICE not in links
