"""A federation as it is deployed, `fedgrade serve` and partners' nodes, and an operator who starts again what died."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from clients.node_key import create_node_key
from fedgrade.errors import FedgradeError
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.enrolment import JoinRequest, utc_text, write_request
from fedgrade.trust.identity import SigningKey, read_roster
from server import control as control_module
from server.attached import attached
from server.coordinator_file import CoordinatorSettings
from server.coordinator_folder import CoordinatorFolder, Patience
from server.deployment import _free_ports
from server.enrolment import create_coordinator, enrol
from server.nodes_file import NAME, read_nodes
from server.served_run import resume_served
from tests.faults.serve_of_faults import with_wires
from tests.faults.steps import HOUSE, KEEPER, MARK, RUN, SERVE, SUPEREXEC, SUPERLINK, processes, set_wire
from tests.federation.small_federation import DECLARED, NAMES, SmallFederation

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 120.0
MOST_RESTARTS = 8
AT_REST = (SERVE, KEEPER, SUPERLINK, SUPEREXEC, HOUSE)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one job.

    Attributes:
        weights: digest of the released model.
        twice: by site, how often a stage was paid for again.
        unpaid: counted receipts of stages that nobody paid for.
        said: what the operator was told on the way, in order.
    """

    weights: str
    twice: dict[str, int]
    unpaid: int
    said: tuple[str, ...]


class Served:
    """Folder, processes and operator; a context manager."""

    def __init__(self, root, *, host="127.0.0.1", sites=NAMES, where=()):
        """Nothing starts yet; ``where`` is the start of a command that runs the partners' nodes somewhere else."""
        self.root, self.sites, self._host, self._where = root / "federation", sites, host, where
        self._serving = self._house = None
        self._run_killers = set()
        self._create(root)

    def _create(self, root):
        public, admin = _free_ports(2)
        self.address = f"{self._host}:{public}"
        now = datetime.now(UTC)
        settings = CoordinatorSettings(host=self._host, public_port=public, admin_port=admin, interface=self._host)
        create_coordinator(self.root, settings, now=now)
        folder = CoordinatorFolder(root=self.root)
        small = SmallFederation.create(root / "partners", names=self.sites)
        shutil.move(root / "partners" / "sites", self.root / "sites")
        for site, key in small.site_keys.items():
            own = self.root / "sites" / site
            key.save(own / "key.pem")
            public_key = create_node_key(own / "node_key").read_text().strip()
            wish = JoinRequest(
                site=site, key=key.public, node_key=public_key, declared_items=DECLARED, made=utc_text(now)
            )
            enrol(folder, write_request(wish, key), approve=lambda _: None, now=now)
        (self.root / "logs").mkdir()
        self.folder = folder
        self.federation = replace(
            small,
            root=self.root,
            roster=read_roster(folder.roster),
            coordinator_key=SigningKey.load(folder.key),
            clock=lambda: datetime.now(UTC),
        )

    def __enter__(self):
        self._environment = {**os.environ, MARK: str(self.root)}
        with ExitStack() as stack:
            stack.callback(self.__exit__)
            self.open_house()
            self.keep_serving()
            self.wait_online()
            # It stands: what ends it is the end of the block, and not of this method.
            stack.pop_all()
        return self

    def __exit__(self, *_exception):
        self.close_house()
        self.stop_serving()
        eventually(lambda: not list(processes(self.root, self.sites)), what="processes are left")

    def open_house(self):
        """Start every partner's node."""
        program = [*self._where, sys.executable, str(REPOSITORY / "tests" / "faults" / "house.py"), str(REPOSITORY)]
        with (self.root / "logs" / "house.log").open("ab") as log:
            self._house = subprocess.Popen(
                [*program, str(self.root), self.address, *self.sites],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment,
            )

    def close_house(self):
        """End every partner's node."""
        if self._house is None:
            return
        self._house.stdin.close()
        assert self._house.wait(PATIENCE_SECONDS) == 0

    def set_clock(self, site, seconds):
        """Have the machine of ``site`` be so far off, from a new start of its process on; 0 is right."""
        wrong = self.root / "clocks" / site
        wrong.parent.mkdir(exist_ok=True)
        wrong.write_text(str(seconds))
        self.kill(site)

    def kill(self, kind):
        """`kill -9` every process of this kind."""
        for process in processes(self.root, self.sites):
            if process.kind == kind:
                os.kill(process.number, signal.SIGKILL)

    def log(self, name):
        """What a process wrote to its log so far."""
        return (self.root / "logs" / f"{name}.log").read_text()

    def keep_serving(self, **environment):
        """Start `fedgrade serve` unless it runs, as systemd would."""
        if self._serving is not None and self._serving.poll() is None:
            return
        log = self.root / "logs" / "serve.log"
        with log.open("wb") as stream:
            self._serving = subprocess.Popen(
                [sys.executable, str(REPOSITORY / "tests" / "faults" / "serve_of_faults.py"), "serve", str(self.root)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**self._environment, **environment},
            )
        eventually(lambda: "SuperLink at" in log.read_text() or self._serving.poll() is not None, what="serve")

    def stop_serving(self):
        """End `fedgrade serve` as its operator would."""
        if self._serving is not None:
            self._serving.terminate()
            self._serving.wait(PATIENCE_SECONDS)

    def online(self):
        """Sites whose nodes are online."""
        if not (self.root / NAME).exists():
            return set()
        with attached(self.root) as control:
            online = control.online()
        return {site for site, node in read_nodes(self.root).items() if node in online}

    def wait_online(self):
        """Return when every partner's node is online."""
        eventually(lambda: self.online() == set(self.sites), what="nodes are not online")

    def alive(self):
        """How many processes of each kind there are."""
        return Counter(process.kind for process in processes(self.root, self.sites))

    def kill_at(self, process, step, *, victim=None, place):
        """Have ``victim``, or the process itself, killed when it gets to ``step`` at ``place``."""
        wire = set_wire(self.root, process=process, step=step, victim=victim or process, place=place)
        if (victim or process) == RUN:
            self._run_killers.add(wire)
        return wire

    def put(self, job, *, deadline_seconds=36.0):
        """Make ``job`` the one that is on."""
        self.folder.put_job(job, Patience(deadline_seconds=deadline_seconds))

    def finish(self, job, *, deadline_seconds=36.0):
        """Put ``job`` there and see it to its end, starting again whatever dies; what the operator was told."""
        self.put(job, deadline_seconds=deadline_seconds)
        said = []
        while len(said) < MOST_RESTARTS:
            try:
                self.once(deadline_seconds=deadline_seconds)
                return tuple(said)
            except FedgradeError as error:
                said.append(f"{type(error).__name__}: {error}")
        raise AssertionError(said)

    def once(self, *, deadline_seconds=36.0, attended=True):
        """What `fedgrade resume` does, typed once; an operator who is there stops a run whose process was killed.

        Raises:
            FedgradeError: what it says.
        """
        self.keep_serving()
        over = threading.Event()
        watching = threading.Thread(target=self._stop_what_has_no_process, args=(over,))
        if attended:
            watching.start()
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(control_module, "_BUNDLE", with_wires())
                resume_served(Console(file=io.StringIO()), self.root, deadline=deadline_seconds)
        finally:
            over.set()
            if attended:
                watching.join()

    def _stop_what_has_no_process(self, over):
        """What `fedgrade stop` does, typed by an operator who sees that the run's process alone was killed."""
        while not over.wait(0.2):
            killed = {wire for wire in self._run_killers if wire.exists()}
            if killed and not self.alive()[RUN]:
                with suppress(FedgradeError), attached(self.root) as control:
                    for run in control.unfinished():
                        control.stop(run)
                    self._run_killers -= killed

    def outcome(self, job, said):
        """What came of ``job``, proved."""
        proof = verify_federation(self.root, roster=self.federation.roster).jobs[job.digest]
        assert len(proof.rounds) == job.plan.rounds + 2
        paid = {
            site: Counter((c.purpose, c.round_index) for c in self.federation.charges(site) if c.job == job.digest)
            for site in self.sites
        }
        counted = [(site, (one.purpose, one.round_index)) for one in proof.rounds for site in one.receipts]
        return Outcome(
            weights=self.federation.release(job).release.weights_digest,
            twice={site: extra for site in self.sites if (extra := paid[site].total() - len(paid[site]))},
            unpaid=sum(stage not in paid[site] for site, stage in counted),
            said=said,
        )

    def require_at_rest(self):
        """Every process that serves is there once, and no other."""
        self.keep_serving()
        eventually(lambda: self.alive() == Counter((*AT_REST, *self.sites)), what=lambda: f"{self.alive()}")


def eventually(condition, *, what, seconds=PATIENCE_SECONDS):
    """What ``condition`` returned once it was true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.1)
    return found
