"""The demo's real photos, a few of each recycler: enough to run everything, too few to measure anything."""

from collections.abc import Callable

from fedgrade.data.manifest import Split, read_manifest, write_manifest
from fedgrade.grading import GradeScale

TRAIN, TEST = 12, 6  # items of a recycler


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
