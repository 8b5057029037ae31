"""A machine whose clock is off: on the path of a Python process, it moves its time by FEDGRADE_SHIFT seconds.

Timers that count from no date are left alone, as a wrong clock leaves them.
"""

import datetime as dt
import os
import time

_SECONDS = float(os.environ.get("FEDGRADE_SHIFT", "0"))
_now, _now_ns, _date_and_time = time.time, time.time_ns, dt.datetime


class _Shifted(_date_and_time):
    @classmethod
    def now(cls, tz=None):
        return _date_and_time.now(tz) + dt.timedelta(seconds=_SECONDS)


if _SECONDS:
    time.time = lambda: _now() + _SECONDS
    time.time_ns = lambda: _now_ns() + int(_SECONDS * 10**9)
    dt.datetime = _Shifted
