"""`fedgrade` as it is, in a process whose runs have trip wires: the bundle that it submits names a test's program."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from fedgrade import cli  # noqa: E402 - the tests' own modules are not installed
from server import control  # noqa: E402

RUN = f"""import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import tests.faults.run_of_faults
from server.app import app
__all__ = ["app"]
"""


def with_wires():
    """The bundle of a run with trip wires."""
    return {**control._BUNDLE, "run_of_fedgrade.py": RUN.encode()}


if __name__ == "__main__":
    control._BUNDLE = with_wires()
    cli.main()
