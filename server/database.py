"""PostgreSQL as the place where a coordinator keeps its documents; the one home of its driver.

Each federation has a schema of its own in the database that ``coordinator.yaml`` names. A change is one transaction. A
connection that is lost is made again within a bound, and what was under way is repeated, which changes nothing twice.
One machine at a time: each of its processes holds a shared advisory lock for as long as it is connected, and refuses to
work while another machine holds one.
"""

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from fedgrade.errors import DocumentRefused, FedgradeError, StoreUnavailable
from fedgrade.federation.store import MAX_KEPT_BYTES
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import PublicKey
from server.coordinator_file import VERIFIED
from server.mirror import Mirror

try:
    import psycopg
    from psycopg import sql
except ImportError as error:
    raise FedgradeError(
        "coordinator.database: PostgreSQL needs its driver; install it with pip install 'fedgrade[postgresql]'"
    ) from error

logger = logging.getLogger(__name__)

T = TypeVar("T")
Cursor = psycopg.Cursor[Any]

# A restart of the server takes seconds, a change to its standby a minute.
PATIENCE_SECONDS: Final = 120.0
_RETRY_SECONDS: Final = 0.25
_CONNECT_SECONDS: Final = 10
_PART_BYTES: Final = 4 * 2**20
_MAX_NAME_BYTES: Final = 512
_VERSION: Final = 1
_MAX_REASON: Final = 300  # characters
# What the server asks of a client whose machine may have gone: a minute, and its lock is free.
_SERVER_OPTIONS: Final = (
    "-c statement_timeout=60s -c lock_timeout=20s -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 "
    "-c tcp_keepalives_count=3 -c tcp_user_timeout=60s"
)
# Ours, to notice that the server's machine has gone.
_CLIENT_OPTIONS: Final = {
    "connect_timeout": _CONNECT_SECONDS,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_CREATE: Final = (
    "create schema {schema}",
    "create table {schema}.about (version integer not null)",
    """
    create table {schema}.documents (
        name text collate "C" primary key check (octet_length(name) <= 512),
        size bigint not null,
        digest bytea not null check (octet_length(digest) = 32)
    )""",
    """
    create table {schema}.parts (
        name text collate "C" references {schema}.documents on delete cascade,
        number integer,
        content bytea not null check (octet_length(content) <= 4194304),
        primary key (name, number)
    )""",
    # Weights do not compress, and trying costs more than writing them.
    "alter table {schema}.parts alter content set storage external",
)
_HOLDER: Final = """
    select activity.application_name, coalesce(activity.client_addr::text, 'the same machine')
    from pg_locks held join pg_stat_activity activity using (pid)
    where held.locktype = 'advisory' and held.objsubid = 2 and held.granted
        and held.database = (select oid from pg_database where datname = current_database())
        and held.classid::bigint = %s and held.objid::bigint <> %s
    limit 1"""


class DatabaseUnavailable(StoreUnavailable):
    """The database cannot be used now: unreachable, not permitted, full, or in use by another machine."""


class UsedElsewhere(DatabaseUnavailable):
    """Another machine uses the federation's documents."""


class Database:
    """Documents in one schema of a PostgreSQL database; see ``fedgrade.federation.store.Documents``."""

    def __init__(self, address: str, *, schema: str, machine: str, patience_seconds: float) -> None:
        """Connect, and take the federation for this machine.

        Args:
            address: URL without a password, as the settings have it.
            schema: the federation's own.
            machine: what tells this machine, and the folder on it, from others.
            patience_seconds: how long a connection that is lost is tried to be made again.

        Raises:
            DatabaseUnavailable: it cannot be used now, or another machine uses it.
        """
        self._address = address
        self._schema = schema
        self._locks = _number(schema), _number(machine)
        self._patience_seconds = patience_seconds
        self._connection = self._connected()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def prepare(self, first: Callable[[], Iterable[tuple[str, bytes]]]) -> None:
        """Make the schema if there is none, with the documents ``first`` in it, in one transaction.

        Raises:
            DatabaseUnavailable: it is not permitted, or another version of fedgrade made the schema.
        """

        def work(cursor: Cursor) -> bool:
            cursor.execute("select to_regnamespace(%s) is not null", [self._schema])
            if cursor.fetchone() == (True,):
                # Written, not read: whoever may only read learns it now, and not in the middle of a run.
                self._run(cursor, "update {schema}.about set version = version returning version")
                if (found := cursor.fetchone()) != (_VERSION,):
                    raise DatabaseUnavailable(f"{self}: is of version {found}; this fedgrade has {_VERSION}")
                return False
            for statement in _CREATE:
                self._run(cursor, statement)
            self._run(cursor, "insert into {schema}.about values (%s)", _VERSION)
            for name, content in first():
                self._put(cursor, name, content)
            return True

        if self._done(work):
            logger.info("%s: made", self)

    def read(self, name: str, *, limit: int = MAX_KEPT_BYTES) -> bytes | None:
        """What ``name`` holds.

        Raises:
            DocumentRefused: it is over ``limit`` bytes, or has been changed by others.
            DatabaseUnavailable: the database cannot be used.
        """

        def work(cursor: Cursor) -> bytes | None:
            self._run(cursor, "select size, digest from {schema}.documents where name = %s", name)
            if (found := cursor.fetchone()) is None:
                return None
            size, expected = found
            if size > limit:
                raise DocumentRefused(f"{self.where(name)}: {size} bytes; the limit is {limit}")
            # One more than there should be: a row that was added is not read at length.
            parts = -(-size // _PART_BYTES) + 1
            self._run(
                cursor, "select content from {schema}.parts where name = %s order by number limit %s", name, parts
            )
            content = b"".join(part for (part,) in cursor)
            if hashlib.sha256(content).digest() != expected:
                raise DocumentRefused(f"{self.where(name)}: has changed since it was written; restore the database")
            return content

        return self._done(work)

    def names(self, folder: str) -> tuple[str, ...]:
        """Every name below ``folder``."""
        return tuple(self.digests(folder))

    def digests(self, folder: str) -> dict[str, str]:
        """The digest of every document below ``folder``, by name."""

        def work(cursor: Cursor) -> dict[str, str]:
            columns = "select name, digest from {schema}.documents"
            if folder:
                # Below "a/" is what stands between "a/" and "a0": names compare by their bytes.
                below = " where name > %s and name < %s order by name"
                self._run(cursor, columns + below, f"{folder}/", f"{folder}0")
            else:
                self._run(cursor, columns + " order by name")
            return {name: bytes(found).hex() for name, found in cursor}

        return self._done(work)

    def write(self, changes: Mapping[str, bytes | None]) -> None:
        """Let each name hold its bytes or nothing: all of it, or none.

        Raises:
            DocumentRefused: a name or its bytes are too long.
            DatabaseUnavailable: the database cannot be used; nothing was changed.
        """

        def work(cursor: Cursor) -> None:
            for name, content in changes.items():
                if content is None:
                    self._run(cursor, "delete from {schema}.documents where name = %s", name)
                else:
                    self._put(cursor, name, content)

        self._done(work)

    def touch(self) -> None:
        """Take this machine's lock again if the connection that held it was lost.

        Raises:
            UsedElsewhere: another machine took it meanwhile.
            DatabaseUnavailable: the database cannot be used.
        """

        def work(cursor: Cursor) -> None:
            cursor.execute("select 1")

        self._done(work)

    def where(self, name: str) -> str:
        """The database and the name."""
        return f"{self}: {name}"

    def __str__(self) -> str:
        return f"{self._address.partition('?')[0]}, schema {self._schema}"

    def _put(self, cursor: Cursor, name: str, content: bytes) -> None:
        if len(name.encode()) > _MAX_NAME_BYTES or len(content) > MAX_KEPT_BYTES:
            raise DocumentRefused(f"{self.where(name[:80])}: {len(content)} bytes; the limit is {MAX_KEPT_BYTES}")
        self._run(cursor, "delete from {schema}.documents where name = %s", name)
        row = name, len(content), bytes.fromhex(digest(content))
        self._run(cursor, "insert into {schema}.documents (name, size, digest) values (%s, %s, %s)", *row)
        for number, start in enumerate(range(0, len(content), _PART_BYTES)):
            part = content[start : start + _PART_BYTES]
            self._run(
                cursor, "insert into {schema}.parts (name, number, content) values (%s, %s, %b)", name, number, part
            )

    def _run(self, cursor: Cursor, statement: str, *values: object) -> None:
        """Execute ``statement`` with ``values``; nothing but the schema's own name is ever put into its text."""
        cursor.execute(sql.SQL(statement).format(schema=sql.Identifier(self._schema)), values)

    def _done(self, work: Callable[[Cursor], T]) -> T:
        """What ``work`` returns, done in one transaction, which is begun anew whenever the connection was lost."""
        deadline = time.monotonic() + self._patience_seconds
        while True:
            try:
                with self._connection.transaction(), self._connection.cursor(binary=True) as cursor:
                    return work(cursor)
            except psycopg.Error as error:
                if self._connection.closed:
                    self._reconnect(error, deadline)
                elif not isinstance(error, psycopg.errors.SerializationFailure) or time.monotonic() > deadline:
                    raise self._refused(error) from error

    def _reconnect(self, lost: psycopg.Error, deadline: float) -> None:
        logger.warning("%s: connection lost (%s); trying again", self, _reason(lost))
        self._connection.close()
        while True:
            time.sleep(_RETRY_SECONDS)
            try:
                self._connection = self._connected()
            except DatabaseUnavailable as error:
                if time.monotonic() > deadline:
                    raise type(error)(
                        f"{error}; tried for {self._patience_seconds:g} s; what was kept before stands"
                    ) from error
            else:
                logger.warning("%s: connected again", self)
                return

    def _connected(self) -> psycopg.Connection[Any]:
        """A new connection that holds this machine's lock.

        Raises:
            DatabaseUnavailable: there is none to be had, or another machine holds the lock.
        """
        settings: dict[str, Any] = {**_CLIENT_OPTIONS, "options": _SERVER_OPTIONS, "application_name": _own_name()}
        if "sslmode=" not in self._address:
            # The driver's own default falls back to a connection that anybody can listen to. Sockets ignore it.
            settings["sslmode"] = VERIFIED
        connection = None
        try:
            connection = psycopg.connect(self._address, autocommit=True, **settings)
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.execute("select pg_advisory_lock_shared(%s, %s)", self._locks)
            holder = connection.execute(_HOLDER, self._locks).fetchone()
        except psycopg.Error as error:
            if connection is not None:
                connection.close()
            raise self._refused(error) from error
        if holder is not None:
            connection.close()
            raise UsedElsewhere(
                f"{self}: in use by {holder[0]} at {holder[1]}; one machine at a time: stop fedgrade there, or "
                "wait two minutes if that machine is gone"
            )
        return connection

    def _refused(self, error: psycopg.Error) -> DatabaseUnavailable:
        return DatabaseUnavailable(f"{self}: {_reason(error)}")


def opened(address: str, *, root: Path, federation: PublicKey, patience_seconds: float) -> Database:
    """The database of ``federation`` at ``address``, used from the coordinator's folder ``root`` of this machine.

    Raises:
        DatabaseUnavailable: it cannot be used now, or another machine uses it.
    """
    schema = f"fedgrade_{''.join(federation.fingerprint.split())}"
    return Database(address, schema=schema, machine=_machine(root), patience_seconds=patience_seconds)


@contextmanager
def opened_mirror(address: str, *, root: Path, federation: PublicKey) -> Iterator[Mirror]:
    """The documents of ``federation`` in the database at ``address``, with copies in the coordinator's folder ``root``.

    A database that has none of them yet takes over those of the folder.

    Raises:
        DatabaseUnavailable: it cannot be used now, or another machine uses it.
    """
    with opened(address, root=root, federation=federation, patience_seconds=PATIENCE_SECONDS) as database:
        mirror = Mirror(database, root)
        database.prepare(mirror.in_folder)
        yield mirror


def _machine(root: Path) -> str:
    """What tells this machine, since it was started, and the folder ``root`` on it, from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}:{boot}:{root.resolve()}"


def _own_name() -> str:
    """What other machines are told of this process; PostgreSQL keeps 63 bytes of it."""
    return f"fedgrade on {socket.gethostname()[:30]}, process {os.getpid()}"


def _number(name: str) -> int:
    """An advisory lock's number for ``name``, of 31 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def _reason(error: psycopg.Error) -> str:
    """What the server said, or the driver, in one line."""
    return " ".join((error.diag.message_primary or str(error)).split())[:_MAX_REASON]
