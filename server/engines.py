"""Three ways to run the same job over the same files: a Flower deployment, Flower's simulation engine, one process."""

import logging
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from fedgrade.errors import DocumentRefused
from fedgrade.federation.exchange import Cohort
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.progress import Progress
from server.coordinate import run_folder
from server.local_federation import LocalFederation
from server.progress_file import progress_in

logger = logging.getLogger(__name__)

Engine = Literal["deployed", "simulated", "in-process"]


class Watcher(Protocol):
    """Whoever shows an operator how a run goes; called from any thread."""

    def note(self, line: str) -> None:
        """Something happened that is no stage."""

    def features(self, percent: int) -> None:
        """Sites have features of this share of their photos."""

    def watch(self, progress: Progress) -> None:
        """A stage is finished."""


_PROGRESS_SECONDS = 0.2
_FEATURES = re.compile(rb"features: (\d+) %")
_ONLINE_SECONDS = 300.0


def run_engine(engine: Engine, federation: LocalFederation, watcher: Watcher) -> None:
    """Run the job that lies in ``federation`` to its release with ``engine``; ``watcher`` is told how it goes.

    Raises:
        RoundFailed, DeploymentFailed: it could not be finished; the checkpoint stands.
    """
    match engine:
        case "deployed":
            _deployed(federation, watcher)
        case "simulated":
            _simulated(federation, watcher)
        case "in-process":
            with federation.answers() as answers:
                watcher.note("sites open in this process")
                run_folder(federation.coordinator, InProcessCohort(sites=answers), report=watcher.watch)


def _deployed(federation: LocalFederation, watcher: Watcher) -> None:
    # Flower costs a second to import, and nothing else here needs it.
    from server.deployment import Deployment  # noqa: PLC0415

    command = shutil.which("fedgrade", path=str(Path(sys.executable).parent))
    if command is None:
        raise DocumentRefused("the command fedgrade is not installed beside this Python; install the package first")
    with Deployment(federation.root) as deployment:
        watcher.note(f"SuperLink up at {deployment.address} (TLS, authenticated nodes)")
        federation.connect(deployment.address, deployment.authority)
        for site in federation.sites():
            deployment.enrol(site, federation.node_key(site))
            deployment.start_site(site, [command, "site", "up", str(federation.site_file(site).resolve())])
        # Five processes import torch at once; on a busy machine that takes minutes.
        deployment.wait_online(timeout_seconds=_ONLINE_SECONDS)
        watcher.note(
            f"{len(federation.sites())} sites online; each checks its photos and extracts features it has not cached"
        )
        with followed(federation, watcher):
            deployment.follow(deployment.submit(), on_line=lambda line: logger.debug("%s", line))


def _simulated(federation: LocalFederation, watcher: Watcher) -> None:
    from server.simulate import simulate  # noqa: PLC0415

    with federation.answers() as answers:
        watcher.note(f"{len(answers)} sites in Flower's simulation engine")

        def coordinate(cohort: Cohort) -> None:
            run_folder(federation.coordinator, cohort, report=watcher.watch)

        simulate(answers, coordinate)


@contextmanager
def followed(federation: LocalFederation, watcher: Watcher) -> Iterator[None]:
    """Show ``watcher`` what the run's own processes write down, until the block ends."""
    stop = threading.Event()
    reader = threading.Thread(target=_follow, args=(federation, watcher, stop), daemon=True)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def _follow(federation: LocalFederation, watcher: Watcher, stop: threading.Event) -> None:
    logs = [federation.root / "logs" / f"site-{site}.log" for site in federation.sites()]
    began = False
    # None yet in a folder that was put together again from a database and copies of keys.
    federation.coordinator.progress.touch()
    with federation.coordinator.progress.open("rb") as file:
        while True:
            last = stop.is_set()
            for line in iter(file.readline, b""):
                began = True
                if progress := progress_in(line):
                    watcher.watch(progress)
            if last:
                return
            if not began:
                watcher.features(_feature_share(logs))
            stop.wait(_PROGRESS_SECONDS)


def _feature_share(logs: Sequence[Path]) -> int:
    """Percent of their photos that sites, on average, say in their logs to have features of."""
    shares = [_FEATURES.findall(log.read_bytes()) for log in logs if log.exists()]
    return sum(int(said[-1]) for said in shares if said) // max(1, len(logs))
