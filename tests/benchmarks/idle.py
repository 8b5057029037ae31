"""What a node costs while nothing happens: processor time and memory of ``fedgrade site up``, online and unasked."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from fedgrade.job import JobSpec
from server.deployment import Deployment
from server.local_federation import Terms, create_local_federation

SETTLING_SECONDS: Final = 45.0
MEASURED_SECONDS: Final = 120.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_MEGABYTE: Final = 2**20


def idle(spec: JobSpec, *, cache: Path) -> str:
    """The table of one node, one SuperLink and what they serve: five nodes online, no run."""
    with tempfile.TemporaryDirectory(prefix="fedgrade-bench-") as folder:
        terms = Terms.for_job(spec, epsilon_limit=spec.privacy.target_epsilon)
        federation = create_local_federation(
            Path(folder) / "federation", scale=spec.grading, data=spec.data, terms=terms, cache=cache
        )
        command = str(Path(sys.executable).parent / "fedgrade")
        with Deployment(federation.root) as deployment:
            federation.connect(deployment.address, deployment.authority)
            for site in federation.sites():
                deployment.enrol(site, federation.node_key(site))
                deployment.start_site(site, [command, "site", "up", str(federation.site_file(site).resolve())])
            deployment.wait_online(timeout_seconds=300.0)
            time.sleep(SETTLING_SECONDS)
            processes = {
                "one node (mean of five)": [deployment.process(f"site-{site}").pid for site in federation.sites()],
                "SuperLink, five nodes polling": [deployment.process("superlink").pid],
                "superexec": [deployment.process("superexec").pid],
            }
            before = {name: sum(map(_processor_seconds, pids)) for name, pids in processes.items()}
            began = time.monotonic()
            time.sleep(MEASURED_SECONDS)
            elapsed = time.monotonic() - began
            rows = [
                f"| {name} | {100 * (sum(map(_processor_seconds, pids)) - before[name]) / elapsed / len(pids):.2f} | "
                f"{_resident(pids) / len(pids):.0f} | {_own(pids) / len(pids):.0f} |"
                for name, pids in processes.items()
            ]
    said = (
        f"Over {MEASURED_SECONDS:.0f} s, begun {SETTLING_SECONDS:.0f} s after the nodes came online. *Its own*: not "
        "shared with other processes of this machine (PSS)."
    )
    head = ("| process | % of a core | resident, MB | of it its own, MB |", "|---|---|---|---|")
    return "\n".join([*head, *rows, "", said])


def _processor_seconds(pid: int) -> float:
    # The name in parentheses may itself hold blanks; the fields begin after the last one.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident(pids: list[int]) -> float:
    return sum(_kilobytes(f"/proc/{pid}/status", "VmRSS") for pid in pids) * 1024 / _MEGABYTE


def _own(pids: list[int]) -> float:
    return sum(_kilobytes(f"/proc/{pid}/smaps_rollup", "Pss") for pid in pids) * 1024 / _MEGABYTE


def _kilobytes(path: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))
