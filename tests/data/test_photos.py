import hashlib
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedgrade.data.manifest import Photo, Provenance, Split, read_manifest, write_manifest
from fedgrade.data.photos import PhotoLimits, digest_file, open_photo, verify_photos
from fedgrade.errors import DataRefused
from fedgrade.grading import GradeScale

LIMITS = PhotoLimits()
SCALE = GradeScale(name="two", labels=("A", "B"), critical=(), cost=((0, 1), (1, 0)))


def described(path, raw):
    return Photo(
        path=path,
        digest=hashlib.sha256(raw).hexdigest(),
        item=f"item of {path}",
        source=f"source of {path}",
        grade="A",
        split=Split.TRAIN,
        provenance=Provenance.REAL,
        licence="own",
        origin="test",
    )


def stored(root, raw, path="photo.png"):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(raw)
    return described(path, raw)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png_header(width, height, colour=2):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def opened(root, raw, limits=LIMITS):
    return open_photo(root, stored(root, raw), limits)


def test_a_colour_photo_comes_back_as_it_is(tmp_path):
    pixels = noise(20, 30, 3)
    again = opened(tmp_path, encoded(Image.fromarray(pixels)))
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, pixels)
    again[0, 0] = 0


def test_grey_is_repeated_over_the_colours(tmp_path):
    grey = noise(20, 30)
    np.testing.assert_array_equal(opened(tmp_path, encoded(Image.fromarray(grey))), np.stack([grey] * 3, axis=2))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    deep = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    again = opened(tmp_path, encoded(Image.fromarray(deep)))
    np.testing.assert_array_equal(again[0, :, 0], [0, 1, 128, 255])
    np.testing.assert_array_equal(again[:, :, 0], again[:, :, 2])


def test_a_palette_is_resolved(tmp_path):
    image = Image.fromarray(noise(20, 30, 3)).quantize(8)
    np.testing.assert_array_equal(opened(tmp_path, encoded(image)), np.asarray(image.convert("RGB")))


def test_black_and_white_becomes_0_and_255(tmp_path):
    again = opened(tmp_path, encoded(Image.fromarray(noise(9, 9)).convert("1")))
    assert set(np.unique(again)) == {0, 255}


def test_a_transparent_pixel_is_black_whatever_colour_it_hides(tmp_path):
    pixels = np.array([[[200, 100, 50, 0], [200, 100, 50, 255], [200, 100, 50, 51]]], dtype=np.uint8)
    again = opened(tmp_path, encoded(Image.fromarray(pixels)))
    np.testing.assert_array_equal(again, [[[0, 0, 0], [200, 100, 50], [40, 20, 10]]])


def test_transparent_grey_and_transparent_palettes_are_flattened_too(tmp_path):
    grey = Image.fromarray(np.array([[[200, 0], [200, 255]]], dtype=np.uint8), mode=None)
    assert grey.mode == "LA"
    np.testing.assert_array_equal(opened(tmp_path, encoded(grey))[0, :, 0], [0, 200])
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 7, 7, 7])
    np.testing.assert_array_equal(opened(tmp_path, encoded(palette, transparency=0))[0, :, 0], [0, 7])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_cameras_orientation_is_applied(tmp_path, kind):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    upright = opened(tmp_path, encoded(Image.fromarray(pixels), kind, exif=exif))
    assert upright.shape == (32, 16, 3)
    assert upright[:14].min() > 200
    assert upright[18:].max() < 50


def test_colours_for_print_become_colours_for_screens(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert opened(tmp_path, encoded(image, "JPEG")).min() == 255


def test_sixty_thousand_by_sixty_thousand_pixels_are_refused_without_taking_memory(tmp_path):
    tracemalloc.start()
    with pytest.raises(DataRefused, match=r"photo 'photo\.png'"):
        opened(tmp_path, png_header(60_000, 60_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


@pytest.mark.parametrize("side", [8_000, 10_000, 12_000])
def test_more_pixels_than_the_limit_are_refused_from_the_header(tmp_path, side):
    with pytest.raises(DataRefused, match=r"photo 'photo\.png'"):
        opened(tmp_path, png_header(side, side))


def test_the_pixel_limit_is_exact(tmp_path):
    raw = encoded(Image.fromarray(noise(10, 10)))
    assert opened(tmp_path, raw, PhotoLimits(max_pixels=100)).shape == (10, 10, 3)
    with pytest.raises(DataRefused, match="10 x 10 pixels; the limit is 99"):
        opened(tmp_path, raw, PhotoLimits(max_pixels=99))


def test_the_size_limit_is_checked_before_reading(tmp_path):
    (tmp_path / "photo.png").touch()
    os.truncate(tmp_path / "photo.png", 2**40)  # a terabyte of nothing; reading it would not end
    with pytest.raises(DataRefused, match="1099511627776 bytes; the limit is 67108864"):
        open_photo(tmp_path, described("photo.png", b""), LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_photo_is_refused(tmp_path, kind, kept):
    raw = encoded(Image.fromarray(noise(64, 64, 3)), kind)
    with pytest.raises(DataRefused, match="not a whole PNG or JPEG"):
        opened(tmp_path, raw[: int(len(raw) * kept)])


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "PPM", "EPS"])
def test_other_formats_are_refused_whatever_they_are_called(tmp_path, kind):
    with pytest.raises(DataRefused, match="not a whole PNG or JPEG"):
        opened(tmp_path, encoded(Image.fromarray(noise(8, 8, 3)), kind))


@given(st.binary(max_size=200), st.integers(0, 300))
def test_damaged_photos_are_refused_or_decoded_and_nothing_else(tmp_path_factory, damage, position):
    root = tmp_path_factory.getbasetemp()
    raw = encoded(Image.fromarray(noise(12, 12, 3)))
    damaged = raw[:position] + damage + raw[position + len(damage) :]
    try:
        pixels = opened(root, damaged)
    except DataRefused:
        return
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8


def test_a_photo_that_changed_since_the_manifest_is_refused(tmp_path):
    photo = stored(tmp_path, encoded(Image.fromarray(noise(8, 8, 3))))
    (tmp_path / "photo.png").write_bytes(encoded(Image.fromarray(noise(8, 8, 3, seed=1))))
    with pytest.raises(DataRefused, match="changed on disk"):
        open_photo(tmp_path, photo, LIMITS)


def test_a_missing_photo_is_named(tmp_path):
    with pytest.raises(DataRefused, match=r"'photo\.png': No such file"):
        open_photo(tmp_path, described("photo.png", b""), LIMITS)


def test_no_link_is_followed_neither_to_a_file_nor_through_a_folder(tmp_path):
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    root.mkdir()
    raw = encoded(Image.fromarray(noise(8, 8, 3)))
    stored(outside, raw, "secret.png")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    for path in ("link.png", "folder/secret.png"):
        with pytest.raises(DataRefused, match="without links"):
            open_photo(root, described(path, raw), LIMITS)


def test_a_folder_or_a_pipe_is_no_photo(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in ("folder", "pipe"):
        with pytest.raises(DataRefused, match="not a plain file"):
            open_photo(tmp_path, described(path, b""), LIMITS)


def test_photos_in_folders_are_found(tmp_path):
    pixels = noise(8, 8, 3)
    photo = stored(tmp_path, encoded(Image.fromarray(pixels)), "2024/line 1/ä.png")
    np.testing.assert_array_equal(open_photo(tmp_path, photo, LIMITS), pixels)
    assert digest_file(tmp_path / photo.path) == photo.digest


def test_opening_photos_leaves_no_descriptor_behind(tmp_path):
    good = stored(tmp_path, encoded(Image.fromarray(noise(8, 8, 3))), "a/b/good.png")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for photo in (good, described("a/b/missing.png", b""), described("a/missing/x.png", b""), described("a/b", b"")):
        try:
            open_photo(tmp_path, photo, LIMITS)
        except DataRefused:
            continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_verifying_reads_every_digest_and_decodes_nothing(tmp_path):
    photos = (stored(tmp_path, b"no photo at all", "a.png"), stored(tmp_path, b"nor this", "b.png"))
    manifest = read_manifest(write_manifest(photos), SCALE)
    verify_photos(manifest.photos, tmp_path, LIMITS)
    (tmp_path / "b.png").write_bytes(b"nor That")
    with pytest.raises(DataRefused, match=r"'b\.png': changed on disk"):
        verify_photos(manifest.photos, tmp_path, LIMITS)


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_pixels": 0}, {"max_pixels": -1}])
def test_limits_that_let_nothing_through_are_refused(limits):
    with pytest.raises(DataRefused, match="at least 1"):
        PhotoLimits(**limits)
