"""Ends a group of processes when whoever started them ends, however that happened.

Started as leader of a new process group with a pipe as standard input. The deployment puts every child into this group
at birth and holds the pipe's other end; when that end closes, by intent or because the deployment was killed with a
signal nobody can catch, the group gets SIGTERM and, three seconds later, SIGKILL. A parent-death signal would not do:
it does not reach grandchildren, and it fires when the starting thread ends. Only the standard library is imported.
"""

import os
import signal
import sys
import time
from pathlib import Path

_GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.02


def others_alive(group: int) -> bool:
    """Whether a process of ``group`` besides its leader still runs (Linux; elsewhere True, and the grace is waited)."""
    processes = Path("/proc")
    if not processes.is_dir():
        return True
    for entry in processes.iterdir():
        if not entry.name.isdecimal() or int(entry.name) == group:
            continue
        try:
            # The name in parentheses may itself hold blanks and parentheses; the fields begin after the last one.
            state, _parent, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def main() -> None:
    """Wait for the end of standard input, then end the group."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    group = os.getpgrp()
    os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and others_alive(group):
        time.sleep(_POLL_SECONDS)
    # Takes this process with it, as the last of the group.
    os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
