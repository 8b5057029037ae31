"""The demo's real photos, a few of each recycler: enough to run everything, too few to measure anything."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedgrade.data.manifest import Split, read_manifest, write_manifest
from fedgrade.grading import GradeScale

TRAIN, TEST = 12, 6  # items of a recycler
# Average pooling alone: a third of the features, and one exported backbone for all who ask for it.
POOLING = "model.pooling=[average]"


def shared_backbones(factory: pytest.TempPathFactory) -> Path:
    """A folder that lasts as long as the session, whoever asks; one for all processes that share the tests."""
    here = factory.getbasetemp()
    folder = (here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "backbones"
    folder.mkdir(exist_ok=True)
    return folder


def cache_beside(folder: Path, factory: pytest.TempPathFactory) -> Path:
    """``folder / "cache"``, its backbones those of the session."""
    cache = folder / "cache"
    cache.mkdir()
    (cache / "backbones").symlink_to(shared_backbones(factory))
    return cache


def few(site_manifests: Callable[..., dict[str, bytes]], *, recyclers: int) -> Callable[..., dict[str, bytes]]:
    """``site_manifests``, cut down to the first items of the first recyclers."""

    def cut(scale: GradeScale, **settings: object) -> dict[str, bytes]:
        manifests = site_manifests(scale, **settings)
        return {site: _first_items(manifests[site], scale) for site in sorted(manifests)[:recyclers]}

    return cut


def _first_items(raw: bytes, scale: GradeScale) -> bytes:
    manifest = read_manifest(raw, scale)
    chosen = (*manifest.items(Split.TRAIN)[:TRAIN], *manifest.items(Split.TEST)[:TEST])
    return write_manifest([photo for item in chosen for photo in item.photos])
