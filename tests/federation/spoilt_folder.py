"""Ways to spoil the folder of a federation, and what must come of it."""

from pathlib import Path

import pytest

from fedgrade.errors import LedgerBroken
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from tests.federation.small_federation import FIRST


def checked_files(root: Path):
    patterns = (
        "sites/*/ledger.jsonl",
        "coordinator/ledger.jsonl",
        "coordinator/witnessed/*.json",
        "jobs/*/receipts/*/*",
        "jobs/*/evaluation/*",
        "jobs/*/release/*",
    )
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def refused(federation, *parts, kind=LedgerBroken):
    with pytest.raises(kind) as error:
        verify_federation(federation.root)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def resigned(federation, name, change):
    """The site's ledger written anew by the site itself, ``change`` having the last word on every entry."""
    key, path = federation.site_keys[name], federation.ledger(name)
    bodies = [entry.body for entry in read_ledger(path, key=key.public)]
    path.unlink()
    with LedgerWriter.open(path, key=key, observe=lambda _: None) as writer:
        for body in bodies:
            for changed in change(body):
                writer.append(changed, now=FIRST)


def recorded(federation, change):
    """The coordinator's ledger written anew by the coordinator itself."""
    key, path = federation.coordinator_key, federation.root / "coordinator" / "ledger.jsonl"
    bodies = [entry.body for entry in read_ledger(path, key=key.public)]
    path.unlink()
    with LedgerWriter.open(path, key=key, observe=lambda _: None) as writer:
        for number, body in enumerate(bodies):
            for changed in change(number, body):
                writer.append(changed, now=FIRST)
