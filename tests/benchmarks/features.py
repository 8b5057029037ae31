"""Features of the demo's public photos, through the store and the extractor that a site uses."""

import os
from pathlib import Path

import numpy as np

from fedgrade.data import elpv
from fedgrade.data.assets import FeatureStore
from fedgrade.data.manifest import Photo, Provenance, Split
from fedgrade.data.photos import PhotoLimits, digest_file
from fedgrade.job import JobSpec
from fedgrade.model.backbones import extractor


def public_features(spec: JobSpec, *, cache: Path) -> np.ndarray:
    """Features [photos, dimensions] of every photo of the package, in its order; taken once and kept in ``cache``.

    Raises:
        DataRefused: the package with the photos is not installed.
    """
    root = elpv.package_photos()
    photos = [
        Photo(path=f"{cell.name}.png", digest=digest_file(root / f"{cell.name}.png"), item=cell.name,
              source=cell.module, grade=spec.grading.labels[cell.grade], split=Split.TRAIN, provenance=Provenance.REAL,
              licence=elpv.LICENCE, origin=elpv.ORIGIN)
        for cell in elpv.cells()
    ]  # fmt: skip
    cache.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(
        root=root, cache=cache, limits=PhotoLimits(),
        extractor=extractor(spec.model, cache=cache, device="auto", threads=os.cpu_count() or 1),
    )  # fmt: skip
    return store.features(photos, progress=lambda *_: None)
