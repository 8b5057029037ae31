"""``nodes.json``: which Flower node is which site, written at enrolment and read by the run."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

from fedgrade.errors import DocumentRefused
from fedgrade.trust.identity import SiteId, site_id

NAME: Final = "nodes.json"
_MAX_BYTES: Final = 1024 * 1024
_NODE_ID_BITS: Final = 64


def read_nodes(run_directory: Path) -> dict[SiteId, int]:
    """Site to node id, as enrolled.

    Raises:
        DocumentRefused: the file is missing, oversized, or not an object of distinct 64-bit node ids by site.
    """
    path = run_directory / NAME
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
        document = json.loads(raw) if len(raw) <= _MAX_BYTES else None
    except OSError as error:
        raise DocumentRefused(f"{path}: {error.strerror}; enrol the sites first") from error
    except (ValueError, RecursionError) as error:
        raise DocumentRefused(f"{path}: not JSON") from error
    if not isinstance(document, dict) or not all(type(node) is int for node in document.values()):
        raise DocumentRefused(f"{path}: expected one object of node ids by site, at most {_MAX_BYTES} bytes")
    nodes = {site_id(site): node for site, node in document.items()}
    if len(set(nodes.values())) != len(nodes) or not all(0 < node < 1 << _NODE_ID_BITS for node in nodes.values()):
        raise DocumentRefused(f"{path}: node ids must be distinct and of {_NODE_ID_BITS} bits")
    return nodes


class EnrolledNodes(Mapping[SiteId, int]):
    """Site to node id as it is now: looked up in the files each time, so that a revocation takes effect at once.

    A site is in it while ``nodes.json`` has its node and it is enrolled; where nobody keeps a book of that, the roster
    says so.
    """

    def __init__(self, run_directory: Path, enrolled: Callable[[], Collection[SiteId]], *, of: Path) -> None:
        """Read both.

        Args:
            run_directory: holds ``nodes.json``.
            enrolled: reads who is enrolled.
            of: the file that it reads; read again only when it has changed.

        Raises:
            DocumentRefused: there is no ``nodes.json`` yet, or one is malformed.
        """
        self._run_directory = run_directory
        self._enrolled = enrolled
        self._of = of
        self._seen: tuple[object, ...] = ()
        self._nodes: dict[SiteId, int] = {}
        self._refresh()

    def __getitem__(self, site: SiteId) -> int:
        self._refresh()
        return self._nodes[site]

    def __iter__(self) -> Iterator[SiteId]:
        self._refresh()
        return iter(self._nodes)

    def __len__(self) -> int:
        self._refresh()
        return len(self._nodes)

    def _refresh(self) -> None:
        seen = (version(self._run_directory / NAME), version(self._of))
        if seen != self._seen:
            nodes, enrolled = read_nodes(self._run_directory), self._enrolled()
            self._nodes = {site: node for site, node in nodes.items() if site in enrolled}
            self._seen = seen


def version(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


def write_nodes(run_directory: Path, nodes: Mapping[SiteId, int]) -> None:
    """The file holds ``nodes``, or what it held before."""
    path = run_directory / NAME
    draft = path.with_name(f".{NAME}.{os.getpid()}")
    draft.write_text(json.dumps(dict(sorted(nodes.items())), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
