"""One job at a time in a coordinator's folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedgrade.errors import JobRefused
from fedgrade.trust.file_lock import lock_alone


@contextmanager
def run_lock(root: Path) -> Iterator[None]:
    """Nobody else runs a job in the federation at ``root`` until the block ends.

    Raises:
        JobRefused: somebody does already; names the process to wait for.
    """
    path = root / "coordinator" / "run.lock"
    with path.open("a+") as file:
        if not lock_alone(file):
            file.seek(0)
            raise JobRefused(
                f"{root}: process {file.read(20).strip() or 'of another user'} runs a job here; wait until it has "
                "ended, or give --federation another folder"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
