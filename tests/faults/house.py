"""Every partner of a served federation on one machine: a process each, started again when it dies, as systemd would.

``python house.py <repository> <folder> <address> <site> …``; ends with its standard input. The sites and their nodes
are the product's own, without noise, as only tests can; what is heavy is imported once and shared by forking.
"""

import datetime as dt
import logging
import os
import runpy
import select
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY, ROOT, ADDRESS, *NAMES = sys.argv[1:]
sys.path.insert(0, REPOSITORY)
FOLDER = Path(ROOT)

from clients.node import NodeLink, serve  # noqa: E402 - the tests' own modules are not installed
from fedgrade import job  # noqa: E402
from fedgrade.federation import releases  # noqa: E402
from fedgrade.federation.site import Site  # noqa: E402
from fedgrade.trust.identity import SigningKey, read_roster, site_id  # noqa: E402
from tests.faults.policies import PATIENT  # noqa: E402
from tests.faults.steps import BEGINNING, SITE_STEPS, SUM_SITE_STEPS, Wires  # noqa: E402
from tests.federation.small_federation import SmallFederation, calibrate_once, zeros  # noqa: E402

RESTART_SECONDS = 0.2
logger = logging.getLogger(__name__)


def keep_place(wires):
    """Have ``wires`` know which part of a job is asked for."""
    admit, contribute, commit = Site._admit, Site._contribute, Site._commit

    def admit_in_place(self, *arguments):
        # A process that lives on is still where the last job ended.
        wires.place = BEGINNING
        return admit(self, *arguments)

    def contribute_in_place(self, request, body, *arguments):
        wires.place = body.purpose, body.round_index
        return contribute(self, request, body, *arguments)

    def commit_in_place(self, job_digest, body, *arguments):
        task = body.proposal.terms.task
        wires.place = task.purpose, task.round_index
        return commit(self, job_digest, body, *arguments)

    Site._admit, Site._contribute, Site._commit = admit_in_place, contribute_in_place, commit_in_place


def live(name):
    """Be the site ``name`` until the process ends."""
    wrong = FOLDER / "clocks" / name
    if wrong.exists():
        shift_clock(float(wrong.read_text()))
    Path("/proc/self/comm").write_text(name)
    log = os.open(FOLDER / "logs" / f"site-{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Some library has made handlers of its own by now.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    wires = Wires(FOLDER, name, tuple(NAMES))
    wires.stretch({**SITE_STEPS, **SUM_SITE_STEPS})
    keep_place(wires)
    site, folder = site_id(name), FOLDER / "sites" / name
    federation = SmallFederation(
        root=FOLDER,
        roster=read_roster(FOLDER / "roster.json"),
        coordinator_key=SigningKey.generate(),  # not the coordinator's: this is a site
        clock=lambda: datetime.now(UTC),
        site_keys={site: SigningKey.load(folder / "key.pem")},
    )
    link = NodeLink(
        address=ADDRESS,
        root_certificate=FOLDER / "superlink" / "ca.pem",
        node_key=folder / "node_key",
        idle_poll_seconds=0.3,
        retry_cap_seconds=1.0,
    )
    with federation.site(site, policy=PATIENT) as opened:
        serve(link, opened.answer, stop=threading.Event())


def shift_clock(seconds):
    """Move this process's time; what was imported before the fork has to be told."""
    os.environ["FEDGRADE_SHIFT"] = str(seconds)
    right = datetime
    runpy.run_path(str(Path(__file__).with_name("off_clock") / "sitecustomize.py"))
    for module in list(sys.modules.values()):
        if getattr(module, "datetime", None) is right:
            module.datetime = dt.datetime


def born(name):
    """The process of the site ``name``."""
    child = os.fork()
    if child == 0:
        try:
            live(name)
        except Exception:
            logger.exception("%s ended", name)
        os._exit(1)
    return child


if __name__ == "__main__":
    releases.discrete_gaussian = zeros
    job.calibrate = calibrate_once
    running = {born(name): name for name in NAMES}
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        ended, _ = os.waitpid(-1, os.WNOHANG)
        if ended:
            time.sleep(RESTART_SECONDS)
            name = running.pop(ended)
            running[born(name)] = name
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
