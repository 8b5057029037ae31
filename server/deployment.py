"""A whole federation on this machine: SuperLink, superexec, one resident node a site, and the run between them.

Real processes, real TLS, real signatures, on loopback. Everything is written below the run directory, and no process
outlives the deployment: see server/keeper.py.
"""

import logging
import os
import re
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final, Self

from fedgrade.errors import FedgradeError
from fedgrade.trust.identity import SiteId
from server import keeper
from server.app import RUN_DIRECTORY
from server.attached import admin_authority
from server.certificates import certify
from server.control import Control, ControlRefused, RunStatus
from server.listener import CANNOT_LISTEN
from server.nodes_file import NAME, read_nodes, write_nodes
from server.private_files import ensure_token, read_private
from server.superlink import QUIET

logger = logging.getLogger(__name__)

_START_SECONDS: Final = 60.0
_LOG_BYTES: Final = 100_000
_LOG_TAIL: Final = 2000  # characters
# In a log of lines, and in one of JSON.
_CANNOT_LISTEN: Final = re.compile(rf'{CANNOT_LISTEN} [^"\n]+')


class DeploymentFailed(FedgradeError):
    """A process of the federation did not start or ended early, or the run did not complete."""


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Where the SuperLink is reached; by default on loopback, at ports that happen to be free.

    Attributes:
        interface: on which partners reach it.
        hosts: public names and addresses in its certificate, besides loopback.
        public_port: for partners; 0 for a free one.
        admin_port: on loopback, for the coordinator's own tools; 0 for a free one.
    """

    interface: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()
    public_port: int = 0
    admin_port: int = 0


class Deployment:
    """A SuperLink and its superexec, then sites and runs; a context manager.

    ```python
    with Deployment(run_directory) as deployment:
        deployment.enrol(site, public_key)           # writes nodes.json
        deployment.start_site(site, ["fedgrade", "site", "up", "site.yaml"])
        deployment.wait_online()
        deployment.follow(deployment.submit(), on_line=print)
    ```

    Attributes:
        run_directory: absolute; secrets, certificates, database, logs, ``nodes.json`` and FLWR_HOME lie below it.
        address: ``host:port`` for partners.
        authority: the certificate that partners need.
        admin_authority: the certificate that the coordinator's own tools need.
    """

    def __init__(self, run_directory: Path, *, listen: Listen = Listen()) -> None:
        """Nothing starts yet.

        Args:
            run_directory: below which everything is written.
            listen: where the SuperLink is reached.
        """
        self.run_directory = run_directory.resolve()
        self._listen = listen
        self.address = ""
        self.authority = self.run_directory / "superlink" / "ca.pem"
        self.admin_authority = admin_authority(self.run_directory)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs_begin: dict[str, int] = {}
        self._nodes: dict[SiteId, int] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        """Start SuperLink and superexec.

        Raises:
            DeploymentFailed: one of them did not start; its log's end is in the text.
        """
        (self.run_directory / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._exit:
            self._start_keeper()
            self._start_superlink()
            # Everything started: the stack now ends with the deployment and not with this method.
            self._exit = self._exit.pop_all()
        return self

    def __exit__(self, *_exception: object) -> None:
        """End every process and wait until the last is gone."""
        self._exit.close()

    @property
    def control(self) -> Control:
        """The hand on the running SuperLink."""
        return self._control

    @property
    def admin(self) -> str:
        """``host:port`` of the listener for the coordinator's own commands."""
        return f"127.0.0.1:{self._admin_port}"

    def enrol(self, site: SiteId, public_key: Path) -> int:
        """Register the node key of ``site`` and note it in ``nodes.json``; the node's id.

        Raises:
            ControlRefused: the SuperLink did not take the key, and did not take it earlier either.
        """
        if (self.run_directory / NAME).exists():
            self._nodes = read_nodes(self.run_directory)
        try:
            self._nodes[site] = self._control.register(public_key, site)
        except ControlRefused:
            # A resumed run finds its sites enrolled in the database of the run it resumes.
            if site not in self._nodes:
                raise
        write_nodes(self.run_directory, self._nodes)
        return self._nodes[site]

    def start_site(
        self, site: SiteId, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the resident node of ``site``; its output goes to ``logs/site-<site>.log``."""
        return self._spawn(f"site-{site}", command, environment=environment)

    def wait_online(self, *, timeout_seconds: float = _START_SECONDS) -> float:
        """Return when every enrolled site's node is online; the seconds that it took.

        Raises:
            DeploymentFailed: a process ended, or the time is up.
        """
        began = time.monotonic()
        while missing := {site for site, node in self._nodes.items() if node not in self._control.online()}:
            self.must_be_alive()
            if time.monotonic() - began > timeout_seconds:
                raise DeploymentFailed(
                    f"sites {sorted(missing)}: not online after {timeout_seconds:.0f} s; "
                    f"see {self.run_directory / 'logs'}"
                )
            time.sleep(0.2)
        return time.monotonic() - began

    def submit(self) -> int:
        """Start the run that the run directory describes; its id.

        Raises:
            ControlRefused: the SuperLink did not take it.
        """
        return self._control.submit({RUN_DIRECTORY: str(self.run_directory)})

    def follow(self, run_id: int, *, on_line: Callable[[str], None] | None = None) -> RunStatus:
        """Return when the run is over and completed; ``on_line`` gets its log line by line, from another thread.

        Raises:
            DeploymentFailed: the run failed or was stopped, or a process of the federation ended.
        """
        reader = threading.Thread(target=self._read_log, args=(run_id, on_line), daemon=True)
        reader.start()
        while not (status := self._control.status(run_id)).finished:
            self.must_be_alive()
            time.sleep(0.5)
        reader.join(timeout=5.0)
        if status.outcome != "completed":
            raise DeploymentFailed(f"run {run_id} {status.outcome}: {status.details or 'no reason given'}")
        return status

    def process(self, name: str) -> subprocess.Popen[bytes]:
        """The process ``superlink``, ``superexec`` or ``site-<site>``."""
        return self._processes[name]

    def restart(self) -> None:
        """End what is left of SuperLink and superexec, and with them the run, and start both at the same ports.

        The SuperLink keeps in memory alone: nodes must be registered again. Nodes that were online come back.

        Raises:
            DeploymentFailed: it did not come up again.
        """
        for name in ("superexec", "superlink"):
            old = self._processes.pop(name, None)
            if old is not None:
                # The run's process, a child of superexec, looks after its parent and ends with it.
                old.kill()
                old.wait()
        self._run_superlink()
        self._wait_for_superlink()
        self._run_superexec()

    def _start_keeper(self) -> None:
        # -I -S: nothing but the standard library, so that it is up before anything can go wrong.
        self._keeper = subprocess.Popen(  # noqa: S603 -- our own file
            [sys.executable, "-I", "-S", str(Path(keeper.__file__))], stdin=subprocess.PIPE, process_group=0
        )
        self._exit.callback(self._end_all)

    def _start_superlink(self) -> None:
        folder = self.run_directory / "superlink"
        self._certificates = certify(folder, self._listen.hosts, now=datetime.now(UTC))
        self._admin_certificates = certify(self.admin_authority.parent, [], now=datetime.now(UTC))
        self._token = ensure_token(folder / "token")
        self._secret = ensure_token(folder / "superexec-secret")
        free = _free_ports(2)
        public, self._admin_port = self._listen.public_port or free[0], self._listen.admin_port or free[1]
        host = next(iter(self._listen.hosts), "127.0.0.1")
        self.address = f"[{host}]:{public}" if ":" in host else f"{host}:{public}"
        self._run_superlink()
        control = Control(self.admin, authority=self.admin_authority, token=read_private(self._token))
        self._control = self._exit.enter_context(control)
        self._wait_for_superlink()
        self._run_superexec()

    def _run_superexec(self) -> None:
        superexec = Path(sysconfig.get_path("scripts")) / "flower-superexec"
        self._spawn(
            "superexec",
            [
                *(str(superexec), "--runtime-api-address", self.admin),
                *("--root-certificates", str(self.admin_authority)),
                *("--superexec-auth-secret-file", str(self._secret)),
            ],
            # How long a submitted run waits to be picked up. Each look costs the SuperLink 10 to 20 ms of its one core.
            environment={"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"},
        )

    def _run_superlink(self) -> None:
        files, admin = self._certificates, self._admin_certificates
        host, port = self._listen.interface, self.address.rpartition(":")[2]
        self._spawn(
            "superlink",
            [
                *(sys.executable, "-m", "server.superlink", "--admin-port", str(self._admin_port)),
                *("--public-host", host, "--public-port", port),
                *("--authority", str(files.authority), "--certificate", str(files.certificate)),
                *("--key", str(files.key), "--admin-authority", str(admin.authority)),
                *("--admin-certificate", str(admin.certificate), "--admin-key", str(admin.key)),
                *("--token-file", str(self._token)),
                *("--superexec-secret-file", str(self._secret)),
                *("--progress", str(self.run_directory / "coordinator" / "progress.jsonl")),
            ],
        )

    def _wait_for_superlink(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            self.must_be_alive()
            try:
                self._control.online()
            except ControlRefused as error:
                if time.monotonic() > deadline:
                    raise DeploymentFailed(f"superlink: not up after {_START_SECONDS:.0f} s ({error})") from error
                time.sleep(0.05)
            else:
                return

    def _spawn(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with self._log(name).open("ab") as log:
            self._logs_begin[name] = log.tell()
            process = subprocess.Popen(  # noqa: S603 -- an argument vector, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.run_directory,
                env={**self._environment(), **(environment or {})},
                # The child is in the keeper's group before its first instruction: no moment in which it could escape.
                process_group=self._keeper.pid,
            )
        self._processes[name] = process
        return process

    def _environment(self) -> dict[str, str]:
        # superexec finds flwr-serverapp by PATH.
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        own = {"PATH": path, "FLWR_HOME": str(self.run_directory / "flower"), "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **QUIET, **own}

    def _log(self, name: str) -> Path:
        return self.run_directory / "logs" / f"{name}.log"

    def must_be_alive(self) -> None:
        """Return if every process still runs.

        Raises:
            DeploymentFailed: one ended; the end of its log is in the text.
        """
        for name, process in self._processes.items():
            if process.poll() is not None:
                ended = f"{name} ended with code {process.returncode}"
                raise DeploymentFailed(f"{ended}; {_why(self._log(name), since=self._logs_begin[name])}")

    def _read_log(self, run_id: int, on_line: Callable[[str], None] | None) -> None:
        try:
            for part in self._control.logs(run_id):
                for line in part.splitlines():
                    if on_line is not None:
                        on_line(line)
        except ControlRefused as error:
            logger.debug("log of run %d: %s", run_id, error)

    def _end_all(self) -> None:
        """Close the pipe, on which the keeper ends its group and itself, and reap every child."""
        pipe: IO[bytes] | None = self._keeper.stdin
        if pipe is not None:
            pipe.close()
        for process in [self._keeper, *self._processes.values()]:
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on. Held together while chosen, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _why(path: Path, *, since: int) -> str:
    """What a log has of the process that began at byte ``since`` of it, for a message to a person."""
    with path.open("rb") as stream:
        stream.seek(max(since, path.stat().st_size - _LOG_BYTES))
        said = stream.read().decode(errors="replace")
    # The one line that says it all; traces of what it led to may follow it.
    if known := _CANNOT_LISTEN.findall(said):
        return str(known[-1])
    return f"{path} ends: {said[-_LOG_TAIL:].strip()}"
