"""Which items are under account in which cohort, so that a new name cannot give old items a new budget.

A private file beside the ledger: for each data lineage and cohort, keyed digests of its photos and of its items' names.
It never leaves the site; the ledger says only that a cohort was opened, and without this file no further one is.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedgrade.data.manifest import Manifest
from fedgrade.errors import DocumentRefused, LedgerBroken, LedgerUnavailable
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

    def require_apart(
        self, manifests: Mapping[str, Manifest], *, lineage: str, opened: frozenset[str]
    ) -> Mapping[str, frozenset[str]]:
        """The members of all cohorts, those in the ledger and those in ``manifests``; no item is in two of them.

        Writes nothing. What the file has on cohorts that stand in the ledger is never replaced; what it has on others
        was left by an admission that came to nothing, and is forgotten.

        Args:
            manifests: the photos that each cohort listed now stands for, by the cohort's name.
            lineage: the data set they belong to.
            opened: names ``lineage/cohort`` that stand in the ledger already.

        Raises:
            LedgerBroken: an item would get a second budget, or the file does not go with the ledger.
        """
        apart = self._opened(opened)
        listed = {f"{lineage}/{cohort}": self._members(manifest) for cohort, manifest in manifests.items()}
        for name in listed.keys() & opened:
            if listed[name] != apart[name]:
                raise LedgerBroken(
                    f"{self._path}: has other items for {name} than the ledger has under account; restore the file "
                    "from the same backup as the ledger"
                )
        # New cohorts among themselves as well: which name comes first must not matter.
        for name in sorted(listed.keys() - opened):
            _require_new(name, listed[name], apart)
            apart[name] = listed[name]
        return apart

    def keep(self, members: Mapping[str, frozenset[str]]) -> None:
        """Put ``members``, as :meth:`require_apart` found them, on disk.

        Raises:
            LedgerUnavailable: the file cannot be written.
        """
        if self._read() != members:
            self._write(members)

    def _opened(self, opened: frozenset[str]) -> dict[str, frozenset[str]]:
        """What the file has on the cohorts in the ledger."""
        known = self._read()
        missing = opened - known.keys()
        if missing:
            raise LedgerBroken(
                f"{self._path}: does not know {min(missing)}, which the ledger has under account; restore the file "
                "from the same backup as the ledger"
            )
        return {name: known[name] for name in opened}

    def _members(self, manifest: Manifest) -> frozenset[str]:
        digests = {self._keyed(b"photo", photo.digest) for photo in manifest.photos}
        return frozenset(digests | {self._keyed(b"item", photo.item) for photo in manifest.photos})

    def _keyed(self, kind: bytes, text: str) -> str:
        return hmac.new(self._secret, kind + b"\0" + text.encode(), hashlib.sha256).hexdigest()

    def _read(self) -> dict[str, frozenset[str]]:
        if not self._path.exists():
            return {}
        try:
            cohorts = decode(_Cohorts, self._path.read_bytes(), what=f"members {self._path}", limit=MAX_MEMBERS_BYTES)
        except DocumentRefused as error:
            # This site's own file, whose name and faults are nobody else's business.
            raise LedgerBroken(f"{error}; restore it from the same backup as the ledger") from error
        return {name: frozenset(members) for name, members in cohorts.members.items()}

    def _write(self, known: Mapping[str, frozenset[str]]) -> None:
        document = _Cohorts(members={name: tuple(sorted(members)) for name, members in known.items()})
        try:
            write_durably(self._path, encode(document))
            self._path.chmod(0o600)
        except OSError as error:
            raise LedgerUnavailable(f"members {self._path}: could not be written ({error.strerror})") from error


def _require_new(name: str, members: frozenset[str], others: Mapping[str, frozenset[str]]) -> None:
    """Refuse a cohort that holds an item of another one."""
    for other, theirs in sorted(others.items()):
        if not members.isdisjoint(theirs):
            raise LedgerBroken(
                f"data {name}: holds items that are under account as {other}, or listed there as well; items keep "
                "their cohort for life, and a new cohort is for new items alone"
            )
