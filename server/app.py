"""The ServerApp of one run: finds the run directory, reaches its sites through Flower, and lets the loop run.

Installed with the coordinator and named by an empty bundle, so a run executes what the operator installed and no code
that came over the network.
"""

import errno
import logging
from pathlib import Path
from typing import Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgrade.errors import FedgradeError, JobRefused
from fedgrade.logs import configure_logs
from fedgrade.memory import keep_large_buffers
from server.grid_cohort import GridCohort

logger = logging.getLogger(__name__)

RUN_DIRECTORY: Final = "run-directory"
_DISK_REFUSES: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

app = ServerApp()


class RunFailed(RuntimeError):
    """Ends the run with Flower's status "failed" and one line of reason."""


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the job that lies in the run directory.

    Raises:
        RunFailed: the job could not be finished; the text is the reason.
    """
    # A process of its own, whose standard error Flower forwards to the coordinator's log.
    configure_logs(logging.INFO, lines="%(levelname)s %(name)s: %(message)s")
    keep_large_buffers()
    # Imported here: the loop brings in numerical libraries that a look at this module should not cost.
    from server.coordinate import coordinate  # noqa: PLC0415
    from server.enrolment import enrolled_nodes  # noqa: PLC0415
    from server.run_now import AwaitedFile  # noqa: PLC0415

    try:
        run_directory = _run_directory(context)
        watch = AwaitedFile(run_directory / "coordinator").awaits
        coordinate(run_directory, GridCohort(grid, enrolled_nodes(run_directory), watch=watch), watch=watch)
    except FedgradeError as error:
        logger.error("run failed: %s", error)  # noqa: TRY400 -- the line says it all; Flower adds its own trace
        raise RunFailed(f"{type(error).__name__}: {error}") from None
    except OSError as error:
        if error.errno not in _DISK_REFUSES:
            raise
        where = error.filename2 or error.filename or context.run_config.get(RUN_DIRECTORY)
        text = f"{where}: {error.strerror}; nothing is half-written and the checkpoint stands; make room, then resume"
        logger.error("run failed: %s", text)  # noqa: TRY400 -- as above
        raise RunFailed(text) from None


def _run_directory(context: Context) -> Path:
    """The absolute path in the run's configuration.

    Raises:
        JobRefused: there is none, or it is no folder.
    """
    given = context.run_config.get(RUN_DIRECTORY, "")
    if not isinstance(given, str) or not given or not Path(given).is_absolute() or not Path(given).is_dir():
        raise JobRefused(f"{RUN_DIRECTORY} {given!r}: expected the absolute path of a run's folder")
    return Path(given)
