"""Many sites on one machine through Flower's simulation engine: how a round's time and the memory grow with them.

The demo's real photos, dealt to as many sites as are asked for. Each count runs in a process of its own, which Ray
wants; called with a count, a folder and a cache, this file is that process.
"""

import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from fedgrade.data import elpv
from fedgrade.data.manifest import Split, read_manifest, write_manifest
from fedgrade.federation.progress import Progress
from fedgrade.grading import GradeScale
from fedgrade.job import JobSpec, plan_job
from server.configure import compose_job
from server.engines import run_engine
from server.local_federation import Terms, create_local_federation

COUNTS: Final = (10, 20, 30, 40, 50)
ROUNDS: Final = 8
_OVERRIDES: Final = (
    "experiment=demo", "privacy=local", "aggregation=mean", f"privacy.rounds={ROUNDS}", "data.minimum_items=10",
)  # fmt: skip


def many_sites(*, cache: Path) -> str:
    """The table of seconds a round and memory by number of sites."""
    found = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory(prefix="fedgrade-bench-") as folder:
            command = [sys.executable, __file__, str(count), folder, str(cache.resolve() / "many" / str(count))]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found[count] = json.loads((Path(folder) / "found.json").read_text())
        sys.stderr.write(f"sites: {count}, {statistics.median(found[count]['seconds']):.2f} s a round\n")
    medians = {count: statistics.median(one["seconds"]) for count, one in found.items()}
    rows = [
        f"| {count} | {medians[count]:.2f} | {1000 * medians[count] / count:.0f} | {one['megabytes']:.0f} |"
        for count, one in found.items()
    ]
    correlation = statistics.correlation(list(medians), list(medians.values()))
    said = (
        f"{ROUNDS} rounds each, the first left out. Correlation of seconds with sites: {correlation:.3f}. Every site "
        "is whole: its own keys, ledger on disk, exact noise and policy; the photos are the demo's, dealt out."
    )
    head = ("| sites | median s a round | ms a round and site | largest memory, MB |", "|---|---|---|---|")
    return "\n".join([*head, *rows, "", said])


class _Stopwatch:
    """Notes when each training round ended."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def note(self, line: str) -> None:
        """Not of interest here."""

    def features(self, percent: int) -> None:
        """Not of interest here."""

    def watch(self, progress: Progress) -> None:
        """A stage is finished."""
        if progress.purpose == "train":
            self.stamps.append(time.monotonic())


def _dealt(scale: GradeScale, *, test_fraction: float, count: int) -> dict[str, bytes]:
    """Manifests of ``count`` sites: each recycler's items in turn to its share of them."""
    recyclers = _site_manifests(scale, test_fraction=test_fraction)
    shares = count // len(recyclers)
    dealt = {}
    for name, raw in recyclers.items():
        manifest = read_manifest(raw, scale)
        for share in range(shares):
            items = [item for split in Split for item in manifest.items(split)[share::shares]]
            dealt[f"{name}-{share}"] = write_manifest([photo for item in items for photo in item.photos])
    return dealt


def _run(spec: JobSpec, count: int, folder: Path, cache: Path) -> None:
    elpv.site_manifests = lambda scale, *, test_fraction: _dealt(scale, test_fraction=test_fraction, count=count)
    terms = Terms.for_job(spec, epsilon_limit=spec.privacy.target_epsilon)
    federation = create_local_federation(
        folder / "federation", scale=spec.grading, data=spec.data, terms=terms, cache=cache
    )
    spec = replace(spec, aggregation=replace(spec.aggregation, minimum_sites=count))
    federation.coordinator.put_job(plan_job(spec, declared_items=federation.declared_items(), nonce="0" * 32))
    stopwatch = _Stopwatch()
    run_engine("simulated", federation, stopwatch)
    seconds = [after - before for before, after in itertools.pairwise(stopwatch.stamps)]
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (folder / "found.json").write_text(json.dumps({"seconds": seconds, "megabytes": megabytes}))


_site_manifests = elpv.site_manifests

if __name__ == "__main__":
    _run(compose_job(list(_OVERRIDES)), int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
