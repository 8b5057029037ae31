"""Whether a site answers: running, paused or draining, as its operator says and not as a coordinator asks.

One gate stands before ``answer`` for every door of the site, so a pause reaches the resident node and the socket alike.
"""

import threading
from collections.abc import Callable
from enum import StrEnum

from fedgrade.errors import MessageRefused

Answer = Callable[[bytes], bytes]


def untold(_request: bytes) -> None:
    """Where nobody wants to know which request's reply was delivered."""


class Mode(StrEnum):
    """What the operator last asked for."""

    RUNNING = "running"
    PAUSED = "paused"
    DRAINING = "draining"


class SiteClosed(MessageRefused):
    """The operator has paused or drained the site; the same request may be sent again later."""


class Gate:
    """Lets one request at a time through to ``answer``, and none while paused or draining.

    Attributes:
        drained: set once the site is draining and the last answer has left.
    """

    def __init__(self, answer: Answer) -> None:
        self.drained = threading.Event()
        self._answer = answer
        self._turn = threading.Lock()
        self._state = threading.Lock()
        self._mode = Mode.RUNNING
        self._inside = 0
        self._answered = 0

    @property
    def mode(self) -> Mode:
        """What the operator last asked for."""
        return self._mode

    @property
    def answered(self) -> int:
        """How many requests have been answered since the process began."""
        return self._answered

    @property
    def answering(self) -> bool:
        """Whether a request is being answered now."""
        return self._inside > 0

    def answer(self, request: bytes) -> bytes:
        """The site's reply to ``request``; requests wait for one another.

        Raises:
            SiteClosed: the site is paused or draining.
        """
        with self._state:
            self._must_be_open()
            self._inside += 1
        try:
            with self._turn:
                # The operator may have closed the gate while this request waited for its turn.
                self._must_be_open()
                reply = self._answer(request)
        finally:
            self._leave()
        self._answered += 1
        return reply

    def pause(self) -> None:
        """No further request is answered until ``resume``; the one inside finishes."""
        self._turn_to(Mode.PAUSED)

    def resume(self) -> None:
        """Requests are answered again. A draining site stays draining: its process is about to end."""
        self._turn_to(Mode.RUNNING)

    def drain(self) -> None:
        """No further request is answered; ``drained`` is set when the one inside has left."""
        self._turn_to(Mode.DRAINING)

    def _turn_to(self, mode: Mode) -> None:
        with self._state:
            if self._mode is not Mode.DRAINING:
                self._mode = mode
            self._note_drained()

    def _must_be_open(self) -> None:
        if self._mode is not Mode.RUNNING:
            raise SiteClosed(f"the site is {self._mode}: its operator decides when it answers again")

    def _leave(self) -> None:
        with self._state:
            self._inside -= 1
            self._note_drained()

    def _note_drained(self) -> None:
        if self._mode is Mode.DRAINING and self._inside == 0:
            self.drained.set()
