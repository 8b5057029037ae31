"""Which items are under account in which cohort, so that a new name cannot give old items a new budget.

A private file beside the ledger: for each data lineage and cohort, keyed digests of its photos and of its items' names.
It never leaves the site; the ledger says only that a cohort was opened, and without this file no further one is.
"""

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from fedgrade.data.manifest import Manifest
from fedgrade.errors import LedgerBroken, LedgerUnavailable
from fedgrade.federation.store import write_durably
from fedgrade.trust.canonical import decode, encode

MAX_MEMBERS_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class _Cohorts:
    members: dict[str, tuple[str, ...]]


class Members:
    """The members of every cohort of one site, on disk."""

    def __init__(self, path: Path, *, secret: bytes) -> None:
        self._path = path
        self._secret = secret

    def require_apart(self, manifest: Manifest, *, lineage: str, cohort: str, opened: frozenset[str]) -> None:
        """Return if no item of ``manifest`` is under account in another cohort; remember the items of this one.

        Args:
            manifest: the photos that ``cohort`` stands for.
            lineage: the data set they belong to.
            cohort: the batch of it that they came in.
            opened: names ``lineage/cohort`` that stand in the ledger already.

        Raises:
            LedgerBroken: an item would get a second budget, or the file does not go with the ledger.
            LedgerUnavailable: the file cannot be written.
        """
        name = f"{lineage}/{cohort}"
        known = self._read()
        missing = opened - known.keys()
        if missing:
            raise LedgerBroken(
                f"{self._path}: does not know {min(missing)}, which the ledger has under account; restore the file "
                "from the same backup as the ledger"
            )
        members = self._members(manifest)
        for other, theirs in known.items():
            if other != name and not members.isdisjoint(theirs):
                raise LedgerBroken(
                    f"data {name}: holds items that are under account as {other}; items keep their cohort for life, "
                    "and a new cohort is for new items alone"
                )
        if known.get(name) != members:
            self._write({**known, name: members})

    def _members(self, manifest: Manifest) -> frozenset[str]:
        digests = {self._keyed(b"photo", photo.digest) for photo in manifest.photos}
        return frozenset(digests | {self._keyed(b"item", photo.item) for photo in manifest.photos})

    def _keyed(self, kind: bytes, text: str) -> str:
        return hmac.new(self._secret, kind + b"\0" + text.encode(), hashlib.sha256).hexdigest()

    def _read(self) -> dict[str, frozenset[str]]:
        if not self._path.exists():
            return {}
        cohorts = decode(_Cohorts, self._path.read_bytes(), what=f"members {self._path}", limit=MAX_MEMBERS_BYTES)
        return {name: frozenset(members) for name, members in cohorts.members.items()}

    def _write(self, known: dict[str, frozenset[str]]) -> None:
        document = _Cohorts(members={name: tuple(sorted(members)) for name, members in known.items()})
        try:
            write_durably(self._path, encode(document))
            self._path.chmod(0o600)
        except OSError as error:
            raise LedgerUnavailable(f"members {self._path}: could not be written ({error.strerror})") from error
