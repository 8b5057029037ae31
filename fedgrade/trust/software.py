"""Which code ran: a digest of this installation's own source, and the versions of the libraries that privacy rests on.

A ledger states both where a job is accepted, so that years later a reader knows what computed and charged. It is the
partner's own word, like everything in its ledger; whether that code is any good, an auditor reads in the source that
the digest names.
"""

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from fedgrade.errors import LedgerUnavailable
from fedgrade.trust.records import Software

PACKAGES = ("clients", "fedgrade", "server")
# Whoever samples, clips, adds noise or accounts; absent ones are left out, as on a compliance laptop.
LIBRARIES = ("dp-accounting", "numpy", "opacus", "opendp", "scipy", "torch")


@cache
def running_software() -> Software:
    """What runs in this process, as it was on disk when first asked.

    Raises:
        LedgerUnavailable: the source cannot be read, so that nobody could ever tell what ran.
    """
    return Software(
        fedgrade=version("fedgrade"),
        source=source_digest({name: root for name in PACKAGES if (root := _root(name)) is not None}),
        libraries={name: found for name in LIBRARIES if (found := _version(name)) is not None},
    )


def source_digest(packages: dict[str, Path]) -> str:
    """SHA-256 over the Python source of ``packages`` (names and their folders), independent of where they lie.

    Hashed is, file after file by name: SHA-256 of ``<package>/<path>``, then SHA-256 of the file's bytes.

    Raises:
        LedgerUnavailable: a file cannot be read.
    """
    total = hashlib.sha256()
    for name, root in sorted(packages.items()):
        try:
            for path in sorted(root.rglob("*.py"), key=lambda one: one.relative_to(root).as_posix()):
                place = f"{name}/{path.relative_to(root).as_posix()}"
                total.update(hashlib.sha256(place.encode()).digest())
                total.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise LedgerUnavailable(
                f"source of {name}: cannot be read ({error.strerror}); reinstall fedgrade"
            ) from error
    return total.hexdigest()


def _root(package: str) -> Path | None:
    found = find_spec(package)
    return Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
