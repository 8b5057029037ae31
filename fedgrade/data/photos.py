"""From photo files to pixels. Every file is hostile until its digest, its size and its decoder say otherwise.

Only PNG and JPEG are decoded: two decoders are two attack surfaces, and any inspection camera's TIFF or BMP can be
converted once, before it enters a manifest.
"""

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fedgrade.data.manifest import Photo
from fedgrade.errors import DataRefused

ByteArray = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG")
SIXTEEN_BITS = 2**16 - 1
EIGHT_BITS = 2**8 - 1
# Pillow's modes for one channel of more than eight bits, as 16-bit PNG files arrive in them.
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True, kw_only=True)
class PhotoLimits:
    """What a photo may cost before it is refused: bytes on disk, pixels once decoded."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_pixels < 1:
            raise DataRefused(f"photo limits: {self.max_bytes} bytes, {self.max_pixels} pixels; both are at least 1")


def open_photo(root: Path, photo: Photo, limits: PhotoLimits) -> ByteArray:
    """The upright pixels [height, width, 3] of ``photo``, from the file that the manifest was made of.

    Grey is repeated over the colours, 16 bits are scaled to 8, transparent pixels are black whatever colour they hide,
    and the camera's orientation mark is applied.

    Raises:
        DataRefused: the file is missing, leaves ``root``, changed since the manifest, is too large, no PNG or JPEG, or
            does not decode.
    """
    raw = read_photo(root, photo, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # The header alone is read here; nothing is allocated for the pixels yet.
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                _check_pixels(photo, image, limits)
                return _pixels(image)
    except DataRefused:
        raise
    except Exception as error:
        # Pillow's decoders promise no list of errors for hostile bytes; whatever it was, the photo is refused.
        raise DataRefused(f"photo {photo.path!r}: not a whole PNG or JPEG: {type(error).__name__}") from error


def read_photo(root: Path, photo: Photo, limits: PhotoLimits) -> bytes:
    """The bytes of ``photo``, whose digest is the manifest's.

    Raises:
        DataRefused: the file is missing, no plain file, reached through a link, too large, or changed.
    """
    try:
        descriptor = _open_beneath(root, PurePosixPath(photo.path))
        try:
            raw = _read(descriptor, photo, limits)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataRefused(
            f"photo {photo.path!r}: {error.strerror}; photos are plain files inside the photo folder, without links"
        ) from error
    if hashlib.sha256(raw).hexdigest() != photo.digest:
        raise DataRefused(f"photo {photo.path!r}: changed on disk since the manifest was made; make the manifest again")
    return raw


def verify_photos(photos: Sequence[Photo], root: Path, limits: PhotoLimits) -> None:
    """Every one of ``photos`` lies beneath ``root`` and is the one its manifest was made of; none is decoded.

    Raises:
        DataRefused: names the first photo that is missing or changed.
    """
    for photo in photos:
        read_photo(root, photo, limits)


def digest_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, for whoever makes a manifest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_beneath(root: Path, path: PurePosixPath) -> int:
    """A descriptor of ``root / path``, walked one folder at a time and through no link.

    O_NOFOLLOW guards only the last name of a path, so every folder on the way is opened with it too. O_NONBLOCK keeps
    a named pipe from holding the site up forever.
    """
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in path.parts[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


def _read(descriptor: int, photo: Photo, limits: PhotoLimits) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise DataRefused(f"photo {photo.path!r}: not a plain file")
    if status.st_size > limits.max_bytes:
        raise DataRefused(f"photo {photo.path!r}: {status.st_size} bytes; the limit is {limits.max_bytes}")
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        # One byte more than it should be: a file that grows while it is read shows as another digest.
        return file.read(status.st_size + 1)


def _check_pixels(photo: Photo, image: Image.Image, limits: PhotoLimits) -> None:
    pixels = image.width * image.height
    if not 0 < pixels <= limits.max_pixels:
        raise DataRefused(
            f"photo {photo.path!r}: {image.width} x {image.height} pixels; the limit is {limits.max_pixels} in all"
        )


def _pixels(image: Image.Image) -> ByteArray:
    upright = ImageOps.exif_transpose(image)
    if upright.mode in DEEP_MODES:
        deep = np.asarray(upright).astype(np.int64).clip(0, SIXTEEN_BITS)
        grey = ((deep * EIGHT_BITS + SIXTEEN_BITS // 2) // SIXTEEN_BITS).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, EIGHT_BITS)), layer)
    return np.array(upright.convert("RGB"), dtype=np.uint8)
