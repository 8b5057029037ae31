"""The stages that a run has finished, a line each, in ``coordinator/progress.jsonl``; begun anew with each job."""

from pathlib import Path

from fedgrade.errors import FedgradeError
from fedgrade.federation.progress import Progress
from fedgrade.trust.canonical import decode, encode


def append(path: Path, progress: Progress) -> None:
    """Add a stage that is finished."""
    with path.open("ab") as file:
        file.write(encode(progress) + b"\n")


def progress_in(line: bytes) -> Progress | None:
    """The stage in ``line``; None where that is torn, or by another version of fedgrade."""
    try:
        return decode(Progress, line)
    except FedgradeError:
        return None


def read_progress(path: Path) -> tuple[Progress, ...]:
    """Every stage in the file at ``path``, in order, each once as it was last finished; none without such a file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return ()
    read = (progress_in(line) for line in lines)
    stages = {progress.stage: progress for progress in read if progress is not None}
    return tuple(stages[number] for number in sorted(stages))
