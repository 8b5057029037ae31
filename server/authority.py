"""How one private authority takes over from another while partners stay connected: three steps, each made by a person.

``ca.pem`` alone says where things stand, and is replaced whole: the first certificate in it signs, and partners trust
all of them, because the bundle carries the same. Keys are numbered (``ca.key``, ``ca-2.key``) and never overwritten.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Final

from cryptography import x509

from fedgrade.errors import DocumentRefused
from server.certificates import authority_key_file, new_authority, read_authorities, write_authorities

_KEY: Final = re.compile(r"ca(?:-([0-9]{1,6}))?\.key")


class Step(StrEnum):
    """What comes next."""

    ANNOUNCE = "announce"
    SWITCH = "switch"
    FINISH = "finish"


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Where a folder of certificates stands, and what is next."""

    folder: Path
    authorities: tuple[x509.Certificate, ...]

    @classmethod
    def of(cls, folder: Path) -> "Rotation":
        """Read it from ``folder``.

        Raises:
            DocumentRefused: there is no authority, or its key is gone.
        """
        authorities = tuple(read_authorities(folder))
        if not 1 <= len(authorities) <= 2:  # noqa: PLR2004 - the old one and the new one
            raise DocumentRefused(f"{folder / 'ca.pem'}: {len(authorities)} authorities; one or two are expected")
        return cls(folder=folder, authorities=authorities)

    @property
    def next(self) -> Step:
        """The step that comes next."""
        if len(self.authorities) == 1:
            return Step.ANNOUNCE
        first, second = (self._number(one) for one in self.authorities)
        return Step.SWITCH if first < second else Step.FINISH

    def take(self, step: Step, *, now: datetime) -> "Rotation":
        """Take ``step``, which must be the next; where things stand then.

        Raises:
            DocumentRefused: another one is next, or a key is gone.
        """
        if step is not self.next:
            raise DocumentRefused(f"authority: {self.next} is the next step, not {step}")
        first, *others = self.authorities
        after: tuple[x509.Certificate, ...]
        match step:
            case Step.ANNOUNCE:
                number = 1 + max(_number(path) for path in self.folder.iterdir() if _KEY.fullmatch(path.name))
                key = self.folder / f"ca-{number}.key"
                after = (first, new_authority(key, name=f"fedgrade authority {number}", now=now))
            case Step.SWITCH:
                after = (others[0], first)
            case Step.FINISH:
                after = (first,)
        write_authorities(self.folder, after)
        if step is Step.FINISH:
            old = authority_key_file(self.folder, others[0])
            old.rename(old.with_name(f"former-{old.name}"))
        return Rotation(folder=self.folder, authorities=after)

    def _number(self, authority: x509.Certificate) -> int:
        return _number(authority_key_file(self.folder, authority))


def _number(key_file: Path) -> int:
    found = _KEY.fullmatch(key_file.name)
    return int(found[1] or 1) if found else 0
