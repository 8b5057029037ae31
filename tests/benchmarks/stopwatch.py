"""Times several ways of doing one thing in turn, so that whatever else the machine does slows all of them down."""

import statistics
import time
from collections.abc import Callable, Mapping


def paired_seconds(ways: Mapping[str, Callable[[], object]], *, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each way; one more of each comes first and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if repetition:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> float:
    """The median over repetitions of what ``of`` took in times of ``to``."""
    return statistics.median(one / other for one, other in zip(seconds[of], seconds[to], strict=True))
