"""How long, and how often, one stage's silent sites are asked again."""

import time
from typing import Final

RESENDS: Final = 2
# Between questions to a site that the job needs: soon, for one that is started again, and then ever more seldom.
_FIRST_PAUSE_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 30.0
# Of the patience: time that an answer to the last question has.
_LEAST_SHARE: Final = 0.05


class Turns:
    """The turns of one question: three at once, or as many as fit into the patience, with pauses that double."""

    def __init__(self, patience_seconds: float, *, each_seconds: float) -> None:
        """The patience begins to run.

        Args:
            patience_seconds: for all turns together, while pauses are made.
            each_seconds: how long one turn may take at most.
        """
        self._end = time.monotonic() + patience_seconds
        self._least_seconds = _LEAST_SHARE * min(patience_seconds, each_seconds)
        self._each_seconds = each_seconds
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._turns = 0

    @property
    def seconds(self) -> float:
        """How long the turn that begins now may take."""
        return max(self._least_seconds, min(self._each_seconds, self._end - time.monotonic()))

    def over(self) -> None:
        """A turn has ended."""
        self._turns += 1

    @property
    def left(self) -> bool:
        """Whether there is one more without a pause."""
        return self._turns <= RESENDS

    def pause_seconds(self) -> float:
        """How long to wait before the next turn; longer each time, and 0 where none of any use would follow."""
        pause = min(self._pause_seconds, self._end - self._least_seconds - time.monotonic())
        self._pause_seconds = min(2.0 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        return max(0.0, pause)
