"""``coordinator.yaml``: where a coordinator listens. Read strictly; written once, with a comment a line."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from fedgrade.errors import DocumentRefused
from fedgrade.trust.canonical import decode_yaml

NAME: Final = "coordinator.yaml"
FILES: Final = "files"
PUBLIC_PORT: Final = 8443
ADMIN_PORT: Final = 8444
_MAX_PORT: Final = 65535
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
VERIFIED: Final = "verify-full"
_PASSWORD: Final = re.compile(r"://[^/@]*:.*@|pass(?:word|phrase)", re.IGNORECASE)
_HOSTS: Final = re.compile(r"(?:^|(?<=,))(?:\[[^\]]*\]|[^:,]+)")
_DATABASE: Final = re.compile(
    r"postgresql://(?:(?P<user>[A-Za-z0-9_.%+-]{1,63})@)?(?P<hosts>[A-Za-z0-9.:,\[\]_-]{0,255})/(?P<database>[A-Za-z0-9_.%-]{0,63})"
    r"(?:\?(?P<options>[A-Za-z0-9_=&.,:/%~-]{0,500}))?"
)
_OPTIONS: Final = frozenset(
    (
        *("host", "passfile", "port", "service", "target_session_attrs"),
        *("sslcert", "sslcrl", "sslkey", "sslmode", "sslrootcert"),
    )
)
_TEXT: Final = """\
# Where this coordinator listens; read by `fedgrade serve` when it starts, and the host again when this file is saved.
host: {host}   # the name or address by which partners reach it; stands in its certificate
public_port: {public_port}   # for partners' nodes; open it in the firewall
admin_port: {admin_port}    # for your own commands; on loopback alone, and behind a token
interface: {interface}     # on which partners reach it; 0.0.0.0 is every one
database: {database}       # where runs and enrolments are kept: files, or postgresql://user@host/name (no password)
"""


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """``coordinator.yaml``, field by field.

    Attributes:
        host: name or address by which partners reach the coordinator.
        public_port: for partners' nodes.
        admin_port: for the coordinator's own commands, on loopback.
        interface: address on which the public port is opened.
        database: ``files``, or the URL of a PostgreSQL database, without a password.
    """

    host: str
    public_port: int
    admin_port: int
    interface: str
    database: str = FILES

    def __post_init__(self) -> None:
        if not (_HOST_NAME.fullmatch(self.host) or _is_address(self.host)):
            raise DocumentRefused(f"coordinator.host: {self.host[:80]!r} is neither a name nor an address")
        if not _is_address(self.interface):
            raise DocumentRefused(f"coordinator.interface: {self.interface[:80]!r} is no address, such as 0.0.0.0")
        for name in ("public_port", "admin_port"):
            if not 1 <= getattr(self, name) <= _MAX_PORT:
                raise DocumentRefused(f"coordinator.{name}: {getattr(self, name)} must be 1 to {_MAX_PORT}")
        if self.public_port == self.admin_port:
            raise DocumentRefused(f"coordinator.admin_port: {self.admin_port} is the public port; choose another")
        if self.database != FILES:
            _check_database(self.database)

    @property
    def address(self) -> str:
        """``host:port`` as partners write it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.public_port}"


def read_settings(root: Path) -> CoordinatorSettings:
    """The settings in the coordinator's folder ``root``.

    Raises:
        DocumentRefused: unreadable, or a key is unknown, missing or mistyped.
    """
    path = root / NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DocumentRefused(
            f"{path}: cannot be read ({error.strerror}); make the folder with `fedgrade coordinator init`"
        ) from error
    return decode_yaml(CoordinatorSettings, raw, what=f"settings {path}")


def settings_yaml(settings: CoordinatorSettings) -> str:
    """The file that says ``settings``; words that YAML might read as something else are quoted."""
    values = {**vars(settings), **{name: f'"{vars(settings)[name]}"' for name in ("host", "interface", "database")}}
    return _TEXT.format(**values)


def _check_database(url: str) -> None:
    """Return if ``url`` names a PostgreSQL database, holds no secret, and nobody on the way can listen or pose as it.

    Raises:
        DocumentRefused: it is not so. The message does not repeat it, for it may hold a password.
    """
    name = "coordinator.database"
    if _PASSWORD.search(url):
        raise DocumentRefused(
            f"{name}: holds a password; take it out, and put it into ~/.pgpass, the file that PGPASSFILE names, or a "
            "service file (?service=…)"
        )
    found = _DATABASE.fullmatch(url)
    if found is None:
        raise DocumentRefused(f"{name}: is neither {FILES} nor like postgresql://user@host/database?sslmode=…")
    pairs = parse_qsl(found["options"] or "", keep_blank_values=True)
    options = dict(pairs)
    if unknown := sorted(set(options) - _OPTIONS):
        raise DocumentRefused(f"{name}: option {unknown[0]!r} is none of {', '.join(sorted(_OPTIONS))}")
    if len(options) != len(pairs):
        raise DocumentRefused(f"{name}: an option appears twice")
    hosts = [*_HOSTS.findall(found["hosts"]), *options.get("host", "").split(",")]
    here = "service" not in options and all(not host or host.startswith("/") or _is_loopback(host) for host in hosts)
    mode = options.get("sslmode", VERIFIED)
    if mode != VERIFIED and not here:
        raise DocumentRefused(f"{name}: sslmode {mode!r} lets others listen; off this machine it must be {VERIFIED}")


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host.strip("[]")) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
