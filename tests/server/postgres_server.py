"""A real PostgreSQL server for tests: a cluster of its own in a temporary folder, on a socket and a loopback port."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from server.database import Database

PASSWORD = "right"  # noqa: S105 - of a server that lives for a minute
_START_SECONDS = 30.0
# Safe only because nothing is to be kept: tests kill the server, never the machine.
_QUICK = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=8MB", "max_connections=20")


def programs() -> Path | None:
    """The folder of the server's programs; None where PostgreSQL is not installed."""
    places = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "postgres").exists() and (place / "initdb").exists()), None)


class Cluster:
    """One server, which can be killed and started again. Its owner is ``owner``; ``fed`` may use database ``fed``."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.folder = folder
        self._bin = bin_folder
        # The server refuses to run as root.
        self._as: dict[str, object] = {}
        self.owner = os.geteuid(), os.getegid()
        if os.geteuid() == 0:
            postgres = pwd.getpwnam("postgres")
            self.owner = postgres.pw_uid, postgres.pw_gid
            self._as = {"user": self.owner[0], "group": self.owner[1], "extra_groups": []}
            shutil.chown(folder, *self.owner)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        options = ["-U", "owner", "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}"]
        options += ["--no-sync", "--no-instructions", "--locale=C", "--encoding=UTF8"]
        command = [self._bin / "initdb", "-D", self.folder / "data", *options]
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **self._as)
        self.start()
        for statement in (
            f"create role fed login password '{PASSWORD}'",
            f"create role reader login password '{PASSWORD}'",
            "create database fed owner fed",
        ):
            self.execute(statement, database="postgres")

    def start(self) -> None:
        """Return when the server takes connections."""
        command = [self._bin / "postgres", "-D", self.folder / "data", "-k", self.folder, "-p", str(self.port)]
        command += [word for setting in (*_QUICK, "listen_addresses=127.0.0.1") for word in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True, **self._as
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.execute("select 1", database="postgres")
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """SIGKILL to the server and to every process of it at once."""
        assert self._process is not None
        process = self._process.pid
        # Each is a group of its own.
        children = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
        for victim in (process, *children):
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()

    def set(self, name: str, value: str) -> None:
        """Change a setting of the server that runs; new connections go by it."""
        self.execute(f"alter system set {name} = '{value}'", database="postgres")
        self.execute("select pg_reload_conf()", database="postgres")
        # The server takes note a moment later.
        deadline = time.monotonic() + _START_SECONDS
        while self.shown(name) != value:
            assert time.monotonic() < deadline, name
            time.sleep(0.02)

    def shown(self, name: str) -> str:
        """What a new connection is told of a setting."""
        with psycopg.connect(self.address(user="owner", database="postgres")) as connection:
            return str(connection.execute("select current_setting(%s)", [name]).fetchone()[0])

    def address(self, *, user: str = "fed", database: str = "fed") -> str:
        """By the Unix socket, without a password."""
        return f"postgresql://{user}@/{database}?host={self.folder}&port={self.port}"

    def execute(self, statement: str, *, database: str = "fed") -> None:
        """Do ``statement`` as the owner of the whole server."""
        with psycopg.connect(self.address(user="owner", database=database), autocommit=True) as connection:
            connection.execute(statement)


@contextmanager
def postgres_cluster(bin_folder: Path) -> Iterator[Cluster]:
    """A server until the block ends; nothing of it stays."""
    # Not pytest's own folder: that one is closed to all but root.
    folder = Path(tempfile.mkdtemp(prefix="fedgrade-postgres-"))
    cluster = Cluster(folder, bin_folder)
    try:
        cluster.create()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@contextmanager
def opened(address, *, schema="laws", machine="one", patience_seconds=0.0):
    with Database(address, schema=schema, machine=machine, patience_seconds=patience_seconds) as database:
        database.prepare(dict[str, bytes]().items)
        yield database
