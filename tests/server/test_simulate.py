import subprocess
import sys

import pytest

pytestmark = pytest.mark.flower

# Ray wants the main thread of a process of its own; a test runner's is neither quiet nor disposable.
PROGRAM = """
import os
import sys
from server.simulate import simulate

def failing(request):
    raise ValueError("photo 17")

def coordinate(cohort):
    requests = {site: os.urandom(8_000) for site in cohort.nodes}
    for _ in range(2):
        replies = cohort.ask(requests, deadline_seconds=60)
        assert replies == {site: requests[site] + site.encode() for site in ("a", "b")}, sorted(replies)
    sys.stdout.write("asked\\n")
    raise RuntimeError("the end")

answers = {"a": lambda request: request + b"a", "b": lambda request: request + b"b", "c": failing}
try:
    simulate(answers, coordinate)
except RuntimeError as error:
    sys.stdout.write(f"{error}\\n")
"""


def test_the_simulation_engine_carries_the_same_bytes_and_passes_errors_on():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines()[-2:] == ["asked", "the end"], done.stderr[-3000:]
    assert "run_simulation" not in done.stderr
