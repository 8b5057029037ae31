"""No process outlives whoever started it, however that one ended."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.keeper import others_alive

pytestmark = pytest.mark.flower

PATIENCE = 60.0
PARENT = """
import sys
from pathlib import Path
from server.deployment import Deployment
with Deployment(Path(sys.argv[1])) as deployment:
    deployment.start_site("idle", [sys.executable, "-c", "import time; time.sleep(600)"])
    sys.stdout.write(f"{deployment._keeper.pid}\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


def test_no_process_is_left_when_the_parent_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        keeper = int(parent.stdout.readline())
        assert others_alive(keeper)
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + PATIENCE
    while (others_alive(keeper) or alive(keeper)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not others_alive(keeper)
    assert not alive(keeper)


def alive(process_id):
    """Whether the process runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
