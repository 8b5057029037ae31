"""``coordinator.yaml``: where a coordinator listens. Read strictly; written once, with a comment a line."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedgrade.errors import DocumentRefused
from fedgrade.trust.canonical import decode_yaml

NAME: Final = "coordinator.yaml"
PUBLIC_PORT: Final = 8443
ADMIN_PORT: Final = 8444
_MAX_PORT: Final = 65535
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_TEXT: Final = """\
# Where this coordinator listens; read by `fedgrade serve` when it starts.
host: {host}   # the name or address by which partners reach it; stands in its certificate
public_port: {public_port}   # for partners' nodes; open it in the firewall
admin_port: {admin_port}    # for your own commands; on loopback alone, and behind a token
interface: {interface}     # on which partners reach it; 0.0.0.0 is every one
"""


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """``coordinator.yaml``, field by field.

    Attributes:
        host: name or address by which partners reach the coordinator.
        public_port: for partners' nodes.
        admin_port: for the coordinator's own commands, on loopback.
        interface: address on which the public port is opened.
    """

    host: str
    public_port: int
    admin_port: int
    interface: str

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
    """The file that says ``settings``; names that YAML would read as numbers are quoted."""
    values = {**vars(settings), "host": f'"{settings.host}"', "interface": f'"{settings.interface}"'}
    return _TEXT.format(**values)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
