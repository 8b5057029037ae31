"""Work beside a loop that must not be kept waiting: a database that is away, or a plan to solve, takes its time."""

import threading
from collections.abc import Callable


class Beside:
    """One piece of work at a time, in a thread that ends with the process; a crash in it is for the work to survive."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether the last work is not done yet."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, work: Callable[[], None]) -> None:
        """Start ``work``, which says itself what went wrong; whoever calls this is not busy."""
        self._thread = threading.Thread(target=work, name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the last work is done."""
        if self._thread is not None:
            self._thread.join()
