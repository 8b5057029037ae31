"""How `serve` keeps its federation's database to this machine for as long as it lives, also when the server restarts.

The lock ends with the connection, and a connection that nobody uses is not missed: so it is used now and then, in a
thread, for a server that is away may keep it waiting, and who was revoked must not be let in meanwhile.
"""

import logging
import threading
from typing import Final, Self

from server.database import Database, DatabaseUnavailable, UsedElsewhere

logger = logging.getLogger(__name__)

# So long, at most, does a database that was restarted not know of this machine.
_TOUCH_SECONDS: Final = 20.0
_JOIN_SECONDS: Final = 5.0


class Hold:
    """This machine's hold on ``database``, which nobody else may use meanwhile, until the block ends."""

    def __init__(self, database: Database, *, every_seconds: float = _TOUCH_SECONDS) -> None:
        self._database = database
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._lost: UsedElsewhere | None = None
        self._thread = threading.Thread(target=self._keep, name="hold on the database", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_JOIN_SECONDS)

    def require(self) -> None:
        """Return if this machine may go on.

        Raises:
            UsedElsewhere: another machine took the federation over while the database was away.
        """
        if self._lost is not None:
            raise UsedElsewhere(f"this machine no longer serves: {self._lost}")

    def _keep(self) -> None:
        while not self._stop.wait(self._every_seconds):
            try:
                self._database.touch()
            except UsedElsewhere as error:
                self._lost = error
                return
            except DatabaseUnavailable as error:
                # Nobody else can use it either, and nodes are served without it.
                logger.warning("%s; tried again in %g s", error, self._every_seconds)
