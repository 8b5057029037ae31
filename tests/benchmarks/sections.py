"""Sections of a file of figures: each measurement replaces its own and leaves the others as they are."""

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path


def replace_section(path: Path, section: str, text: str, *, command: str) -> None:
    """Put ``text``, with how it was got, between the markers of ``section`` in the file ``path``.

    Raises:
        SystemExit: the file has no such markers; nothing is written.
    """
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    stamp = (
        f"Command: `{command}`; {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, "
        f"{os.cpu_count()} shared cores, no GPU, Python {platform.python_version()}, load average {load}."
    )
    block = f"<!-- {section} -->\n{stamp}\n\n{text}\n<!-- end {section} -->"
    old = path.read_text()
    pattern = re.compile(rf"<!-- {section} -->.*?<!-- end {section} -->", re.DOTALL)
    if not pattern.search(old):
        raise SystemExit(f"{path}: has no markers <!-- {section} --> … <!-- end {section} -->")
    path.write_text(pattern.sub(lambda _: block, old))
