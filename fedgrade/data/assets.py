"""From photos to features, each photo once: the store keeps them on disk until the photo's bytes or the model change.

Features are as sensitive as the photos they were taken from: what a photo shows can be told from them in part, and the
privacy budget says nothing about them. The file is for its owner alone (mode 0600), never leaves the site, and
:meth:`FeatureStore.forget_others` drops the rows of photos that a partner has deleted.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedgrade.data.manifest import Photo
from fedgrade.data.photos import ByteArray, PhotoLimits, open_photo
from fedgrade.errors import CacheUnavailable, DataRefused

logger = logging.getLogger(__name__)

FeatureArray = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

BATCH = 32  # photos decoded at once
KEPT_EVERY = 4096  # photos; what an interrupted extraction loses at most
DIGEST_BYTES = hashlib.sha256().digest_size


class Extractor(Protocol):
    """What turns photos into features; the model room builds one, this room only calls it."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything the features depend on: preprocessing, weights, pooling."""

    @property
    def dimensions(self) -> int:
        """Length of one feature vector."""

    def prepare(self, image: ByteArray) -> FeatureArray:
        """Network input [3, input, input] of ``image`` [height, width, 3]."""

    def extract(self, batch: FeatureArray) -> FeatureArray:
        """Features [photos, dimensions] of ``batch`` [photos, 3, input, input]."""


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """Features of the photos beneath ``root``, kept in the folder ``cache``, one file per extractor.

    The digest of a photo's bytes names its row, so that a subset, another order or a few new photos cost nothing for
    what is known already. A file that is torn, changed or foreign is noticed by its own digest and made again.
    """

    root: Path
    cache: Path
    extractor: Extractor
    limits: PhotoLimits

    def features(self, photos: Sequence[Photo], *, progress: Progress) -> FeatureArray:
        """Features [photos, dimensions] of ``photos``, in their order.

        Photos are read only where the cache has no row for them; whether the files are still those of the manifest is
        for :func:`fedgrade.data.photos.verify_photos` to say, once, when a site starts.

        Args:
            photos: whose features are wanted.
            progress: told (done, all) after each batch, and once if there was nothing to do.

        Raises:
            DataRefused: a photo cannot be read, or its features are not finite.
            CacheUnavailable: the cache cannot be written.
        """
        rows = self._kept()
        missing = [photo for photo in photos if bytes.fromhex(photo.digest) not in rows]
        done = len(photos) - len(missing)
        if missing and not rows and any(self.cache.glob("features-*")):
            # Another network, view, precision or kind of device: its numbers are no substitute for these.
            logger.info(
                "features: none are cached under %s, but others are; extracted anew", self.extractor.digest[:16]
            )
        progress(done, len(photos))
        for start in range(0, len(missing), KEPT_EVERY):
            for batch in _batches(missing[start : start + KEPT_EVERY]):
                rows.update(zip(_keys(batch), self._extract(batch), strict=True))
                done += len(batch)
                progress(done, len(photos))
            self._keep(rows)
        found = [rows[key] for key in _keys(photos)]
        return np.stack(found) if found else np.empty((0, self.extractor.dimensions), dtype=np.float32)

    def forget_others(self, photos: Sequence[Photo]) -> None:
        """The cache holds no row but those of ``photos``.

        Rows of this extractor are dropped one by one; another's file goes altogether if it holds any other photo, and
        is made again when it is wanted.
        """
        wanted = set(_keys(photos))
        rows = self._kept()
        for path in self.cache.glob("features-*"):
            if path != self._path and not _known(path) <= wanted:
                path.unlink(missing_ok=True)
        if rows.keys() - wanted:
            self._keep({key: row for key, row in rows.items() if key in wanted})

    @property
    def _path(self) -> Path:
        return self.cache / f"features-{self.extractor.digest}.safetensors"

    def _extract(self, photos: Sequence[Photo]) -> FeatureArray:
        images = (open_photo(self.root, photo, self.limits) for photo in photos)
        features = self.extractor.extract(np.stack([self.extractor.prepare(image) for image in images]))
        shape = (len(photos), self.extractor.dimensions)
        if features.dtype != np.float32 or features.shape != shape or not np.isfinite(features).all():
            raise DataRefused(
                f"photo {photos[0].path!r} and the next: features are {features.dtype} {features.shape} or not finite; "
                f"float32 {shape} is expected"
            )
        return features

    def _kept(self) -> dict[bytes, FeatureArray]:
        """The rows on disk by photo digest; none where there is no whole file of this extractor."""
        if not self._path.is_file():
            return {}
        try:
            with safe_open(self._path, framework="np") as file:
                stated: dict[str, str] = file.metadata() or {}
                keys, features = file.get_tensor("photos"), file.get_tensor("features")
        except (SafetensorError, OSError):
            return {}
        shape = (len(keys), self.extractor.dimensions)
        if stated != self._statement(keys, features) or features.dtype != np.float32 or features.shape != shape:
            return {}
        return {key.tobytes(): row for key, row in zip(keys, features, strict=True)}

    def _keep(self, rows: dict[bytes, FeatureArray]) -> None:
        keys = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        features = np.array(list(rows.values()), dtype=np.float32).reshape(-1, self.extractor.dimensions)
        raw = save({"photos": keys, "features": features}, metadata=self._statement(keys, features))
        try:
            _write_privately(self._path, raw)
        except OSError as error:
            raise CacheUnavailable(
                f"feature cache {self.cache}: {error.strerror}; free space or choose another"
            ) from error

    def _statement(self, keys: npt.NDArray[Any], features: npt.NDArray[Any]) -> dict[str, str]:
        content = hashlib.sha256(keys.tobytes())
        content.update(features.tobytes())
        return {"extractor": self.extractor.digest, "content": content.hexdigest()}


def _known(path: Path) -> set[bytes]:
    """Digests of the photos in a file of features, or of nothing known where it cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            return {key.tobytes() for key in file.get_tensor("photos")}
    except (SafetensorError, OSError):
        return {b"unreadable"}


def _keys(photos: Sequence[Photo]) -> list[bytes]:
    return [bytes.fromhex(photo.digest) for photo in photos]


def _batches(photos: Sequence[Photo]) -> Iterator[Sequence[Photo]]:
    for start in range(0, len(photos), BATCH):
        yield photos[start : start + BATCH]


def _write_privately(path: Path, content: bytes) -> None:
    """``content`` is in the file ``path`` whole, or the file is as before; readable by its owner alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp makes the file with mode 0600, before the first byte is in it.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
