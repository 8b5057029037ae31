"""Three ways to run the same job over the same files: a Flower deployment, Flower's simulation engine, one process."""

import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fedgrade.errors import DocumentRefused
from fedgrade.federation.conversation import Cohort
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.rounds import Progress
from fedgrade.trust.canonical import decode
from server.coordinate import CoordinatorFolder, run_folder
from server.local_federation import LocalFederation

logger = logging.getLogger(__name__)

Engine = Literal["deployed", "simulated", "in-process"]
Watch = Callable[[Progress], None]
Note = Callable[[str], None]

_PROGRESS_SECONDS = 0.2
_ONLINE_SECONDS = 300.0


def run_engine(engine: Engine, federation: LocalFederation, *, watch: Watch, note: Note) -> None:
    """Run the job that lies in ``federation`` to its release with ``engine``; ``note`` gets a line now and then.

    Raises:
        RoundFailed, DeploymentFailed: it could not be finished; the checkpoint stands.
    """
    match engine:
        case "deployed":
            _deployed(federation, watch=watch, note=note)
        case "simulated":
            _simulated(federation, watch=watch, note=note)
        case "in-process":
            with federation.answers() as answers:
                note("sites open in this process")
                run_folder(federation.coordinator, InProcessCohort(sites=answers), report=watch)


def _deployed(federation: LocalFederation, *, watch: Watch, note: Note) -> None:
    # Flower costs a second to import, and nothing else here needs it.
    from server.deployment import Deployment  # noqa: PLC0415

    command = shutil.which("fedgrade", path=str(Path(sys.executable).parent))
    if command is None:
        raise DocumentRefused("the command fedgrade is not installed beside this Python; install the package first")
    # In memory: a restart resumes from the coordinator's own checkpoint, and small rounds are twice as quick.
    with Deployment(federation.root, durable=False) as deployment:
        note(f"SuperLink up at {deployment.address} (TLS, authenticated nodes)")
        federation.connect(deployment.address, deployment.authority)
        for site in federation.sites():
            deployment.enrol(site, federation.node_key(site))
            deployment.start_site(site, [command, "site", "up", str(federation.site_file(site).resolve())])
        # Five processes import torch at once; on a busy machine that takes minutes.
        deployment.wait_online(timeout_seconds=_ONLINE_SECONDS)
        note(f"{len(federation.sites())} sites online; each checks its photos and extracts features it has not cached")
        with _followed(federation.coordinator, watch):
            deployment.follow(deployment.submit(), on_line=lambda line: logger.debug("%s", line))


def _simulated(federation: LocalFederation, *, watch: Watch, note: Note) -> None:
    from server.simulate import simulate  # noqa: PLC0415

    with federation.answers() as answers:
        note(f"{len(answers)} sites in Flower's simulation engine")

        def coordinate(cohort: Cohort) -> None:
            run_folder(federation.coordinator, cohort, report=watch)

        simulate(answers, coordinate)


@contextmanager
def _followed(folder: CoordinatorFolder, watch: Watch) -> Iterator[None]:
    """Show ``watch`` every line that the run's own process adds to the progress file, until the block ends."""
    stop = threading.Event()
    reader = threading.Thread(target=_follow, args=(folder.progress, watch, stop), daemon=True)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def _follow(path: Path, watch: Watch, stop: threading.Event) -> None:
    with path.open("rb") as file:
        while True:
            last = stop.is_set()
            for line in iter(file.readline, b""):
                watch(decode(Progress, line))
            if last:
                return
            stop.wait(_PROGRESS_SECONDS)
