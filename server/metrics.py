"""What an operator's monitoring may know, in Prometheus' text format: requests, sizes, progress. All of it is public.

No number here depends on anybody's data: requests are counted by listener, interface and status, and the progress of a
run is what its coordinator writes down for its own display.
"""

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

PATH: Final = "/metrics"
CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
# Paths come from strangers: they are counted under a few names and never under their own.
_INTERFACES: Final = ("/health", "/v1/fleet/", "/v1/runtime/", "/v1/control/", PATH)
_MAX_PROGRESS_BYTES: Final = 2**20
_PROGRESS: Final = ("stage", "stages", "answered", "participants")


class Metrics:
    """One SuperLink's counters, and the progress of the run that is on.

    Args:
        progress: the file in which a run's coordinator writes a line a finished stage; it may not be there yet.
    """

    def __init__(self, progress: Path) -> None:
        self._progress = progress
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        names = ("listener", "interface", "status")
        self._requests = Counter("fedgrade_requests", "Requests answered.", names, registry=self._registry)
        self._seconds = Histogram(
            "fedgrade_request_seconds", "Time to an answer's end.", ("listener", "interface"), registry=self._registry
        )
        self._stages = {
            name: Gauge(f"fedgrade_run_{name}", meaning, registry=self._registry)
            for name, meaning in zip(
                _PROGRESS,
                (
                    "Stages of the run that are finished.",
                    "Stages that the run has.",
                    "Sites that answered the last finished stage.",
                    "Sites that take part in the run.",
                ),
                strict=True,
            )
        }

    def counted(self, application: Application, *, listener: str) -> Application:
        """``application``, whose HTTP requests are counted as those of ``listener``."""

        async def door(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await application(scope, receive, send)
                return
            began, interface, status = time.perf_counter(), _interface(scope["path"]), ["none"]

            async def noted(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    status[0] = str(message["status"])
                await send(message)

            try:
                await application(scope, receive, noted)
            finally:
                self._requests.labels(listener, interface, status[0]).inc()
                self._seconds.labels(listener, interface).observe(time.perf_counter() - began)

        return door

    def served(self, application: Application) -> Application:
        """``application``, in front of which the page of metrics lies at ``PATH``."""

        async def door(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] != PATH:
                await application(scope, receive, send)
                return
            page = self.page()
            headers = [(b"content-type", CONTENT_TYPE), (b"content-length", str(len(page)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": page})

        return door

    def page(self) -> bytes:
        """Everything, as Prometheus reads it."""
        for name, value in self._read_progress().items():
            self._stages[name].set(value)
        return generate_latest(self._registry)

    def _read_progress(self) -> dict[str, int]:
        """The last whole line of the run's progress; zeros before there is one."""
        nothing = dict.fromkeys(_PROGRESS, 0)
        try:
            with self._progress.open("rb") as file:
                file.seek(max(0, self._progress.stat().st_size - _MAX_PROGRESS_BYTES))
                lines = file.read(_MAX_PROGRESS_BYTES).splitlines()
            last = json.loads(lines[-1]) if lines else {}
        except (OSError, ValueError):  # not there, or caught in the middle of a line
            return nothing
        return {name: last[name] if isinstance(last.get(name), int) else 0 for name in _PROGRESS}


def _interface(path: str) -> str:
    return next(
        (name for name in _INTERFACES if path == name or (name.endswith("/") and path.startswith(name))), "other"
    )
