"""How processes log: lines for people, or one JSON object a line where ``FEDGRADE_LOG_FORMAT=json`` asks for it.

The environment and not an option, because a coordinator's run is a process that Flower starts. Logs name sites, jobs,
rounds and refusals, and never a photo, a label or a count.
"""

import json
import logging
import os
from datetime import UTC, datetime
from typing import Final

from fedgrade.errors import DocumentRefused

FORMAT: Final = "FEDGRADE_LOG_FORMAT"
_LINES: Final = "%(asctime)s %(levelname)s %(message)s"


class JsonLines(logging.Formatter):
    """One JSON object a record: time (UTC, RFC 3339), level, logger, message, and an exception's name and trace."""

    def format(self, record: logging.LogRecord) -> str:
        """``record`` as one line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            entry["exception"] = record.exc_info[0].__name__
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logs(level: int, *, lines: str = _LINES) -> None:
    """Log to standard error from here on; a process calls this once, at its start.

    Args:
        level: below which nothing is logged, whatever libraries set for their own loggers.
        lines: the format of lines for people.

    Raises:
        DocumentRefused: the environment asks for a format that does not exist.
    """
    handler = logging.StreamHandler()
    # On the handler too: libraries that set their own logger to DEBUG would pass the root's level by.
    handler.setLevel(level)
    wanted = os.environ.get(FORMAT, "text")
    if wanted not in {"text", "json"}:
        raise DocumentRefused(f"{FORMAT}={wanted[:40]!r}: must be text or json")
    handler.setFormatter(JsonLines() if wanted == "json" else logging.Formatter(lines))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # httpx writes a line for each poll.
    logging.getLogger("httpx").setLevel(logging.WARNING)
