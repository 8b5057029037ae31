import hashlib
import os
import stat
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from fedgrade.data import assets
from fedgrade.data.assets import FeatureStore
from fedgrade.data.manifest import Photo, Provenance, Split
from fedgrade.data.photos import PhotoLimits
from fedgrade.errors import CacheUnavailable, DataRefused


@dataclass
class Means:
    """A whole extractor that a test can follow by hand: the mean of each colour."""

    digest: str = "a" * 64
    dimensions: int = 3
    largest_batch: int = 0
    prepared: list[tuple[int, ...]] = field(default_factory=list)

    def prepare(self, image):
        self.prepared.append(image.shape)
        return (image[:4, :4] / np.float32(255)).transpose(2, 0, 1)

    def extract(self, batch):
        self.largest_batch = max(self.largest_batch, len(batch))
        return batch.mean((2, 3))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def make_photos(root, count):
    return [make_photo(root, number) for number in range(count)]


def make_photo(root, number):
    pixels = np.full((4, 4, 3), (number % 256, number // 256, 9), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f"{number}.png")
    return Photo(
        path=f"{number}.png",
        digest=hashlib.sha256((root / f"{number}.png").read_bytes()).hexdigest(),
        item=str(number),
        source=str(number),
        grade="A",
        split=Split.TRAIN,
        provenance=Provenance.REAL,
        licence="own",
        origin="test",
    )


def store(root, **changes):
    given = {"root": root, "cache": root.parent / "cache", "extractor": Means(), "limits": PhotoLimits()}
    return FeatureStore(**{**given, **changes})


def silent(done, all_photos):
    pass


def expected(photos):
    numbers = [int(photo.item) for photo in photos]
    return np.array([[n % 256, n // 256, 9] for n in numbers], dtype=np.float32) / 255


def test_features_come_in_the_order_of_the_photos(root):
    photos = make_photos(root, 5)[::-1]
    features = store(root).features(photos, progress=silent)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected(photos), atol=1e-6)


def test_a_second_call_reads_no_photo(root):
    photos = make_photos(root, 5)
    first = store(root).features(photos, progress=silent)
    for path in root.iterdir():
        path.unlink()
    np.testing.assert_array_equal(store(root).features(photos, progress=silent), first)


def test_a_subset_another_order_and_repetitions_come_from_the_same_file(root):
    photos = make_photos(root, 6)
    all_features = store(root).features(photos, progress=silent)
    again = store(root)
    np.testing.assert_array_equal(again.features(photos[4:1:-1], progress=silent), all_features[4:1:-1])
    np.testing.assert_array_equal(again.features([photos[2]] * 2, progress=silent), all_features[[2, 2]])
    assert again.extractor.prepared == []


def test_only_new_photos_are_extracted(root):
    photos = make_photos(root, 6)
    store(root).features(photos[:4], progress=silent)
    grown = store(root)
    np.testing.assert_allclose(grown.features(photos, progress=silent), expected(photos), atol=1e-6)
    assert len(grown.extractor.prepared) == 2


def test_memory_is_bounded_by_batches_of_32(root):
    a_store = store(root)
    a_store.features(make_photos(root, 70), progress=silent)
    assert a_store.extractor.largest_batch == 32


def test_progress_is_told_from_the_start_to_the_end(root):
    photos = make_photos(root, 70)
    seen = []
    store(root).features(photos[:10], progress=silent)
    store(root).features(photos, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(10, 70), (42, 70), (70, 70)]
    store(root).features(photos, progress=lambda done, of: seen.append((done, of)))
    assert seen[3:] == [(70, 70)]


def test_an_interrupted_extraction_keeps_what_it_had(root, monkeypatch):
    monkeypatch.setattr(assets, "BATCH", 2)
    monkeypatch.setattr(assets, "KEPT_EVERY", 4)
    photos = make_photos(root, 6)
    (root / "5.png").write_bytes(b"damaged")
    with pytest.raises(DataRefused, match=r"'5\.png': changed on disk"):
        store(root).features(photos, progress=silent)
    again = store(root)
    again.features(photos[:4], progress=silent)
    assert again.extractor.prepared == []


def cache_file(root):
    (path,) = (root.parent / "cache").iterdir()
    return path


def test_the_cache_is_for_its_owner_alone(root):
    old = os.umask(0)
    try:
        store(root).features(make_photos(root, 1), progress=silent)
    finally:
        os.umask(old)
    assert stat.S_IMODE(cache_file(root).stat().st_mode) == 0o600
    assert stat.S_IMODE(cache_file(root).parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("position", [0, 3, 9, 40, -1, -20])
def test_a_cache_with_one_changed_byte_is_noticed_and_made_again(root, position):
    photos = make_photos(root, 3)
    features = store(root).features(photos, progress=silent)
    raw = bytearray(cache_file(root).read_bytes())
    raw[position] ^= 0x10
    cache_file(root).write_bytes(raw)
    again = store(root)
    np.testing.assert_array_equal(again.features(photos, progress=silent), features)
    assert len(again.extractor.prepared) == 3
    np.testing.assert_array_equal(store(root).features(photos, progress=silent), features)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_torn_cache_is_noticed_and_made_again(root, kept):
    photos = make_photos(root, 3)
    features = store(root).features(photos, progress=silent)
    cache_file(root).write_bytes(cache_file(root).read_bytes()[:kept])
    np.testing.assert_array_equal(store(root).features(photos, progress=silent), features)


def test_another_extractor_never_sees_these_rows(root):
    photos = make_photos(root, 2)
    store(root).features(photos, progress=silent)
    other = store(root, extractor=Means(digest="b" * 64))
    other.features(photos, progress=silent)
    assert len(other.extractor.prepared) == 2
    # Not even when the file is put in place of the other's.
    names = sorted(path.name for path in (root.parent / "cache").iterdir())
    (root.parent / "cache" / names[0]).replace(root.parent / "cache" / names[1])
    fooled = store(root, extractor=Means(digest="b" * 64))
    fooled.features(photos, progress=silent)
    assert len(fooled.extractor.prepared) == 2


def test_a_changed_photo_under_its_old_name_is_another_photo(root):
    photos = make_photos(root, 2)
    store(root).features(photos, progress=silent)
    Image.fromarray(np.full((4, 4, 3), 255, dtype=np.uint8)).save(root / "0.png")
    changed = Photo(**{**vars(photos[0]), "digest": hashlib.sha256((root / "0.png").read_bytes()).hexdigest()})
    np.testing.assert_allclose(store(root).features([changed], progress=silent), [[1, 1, 1]])


def test_deleted_photos_can_be_forgotten(root):
    """Their rows go, and with them another extractor's file that holds one; one that holds none stays."""
    photos = make_photos(root, 3)
    store(root, extractor=Means(digest="b" * 64)).features(photos, progress=silent)
    store(root, extractor=Means(digest="c" * 64)).features(photos[1:], progress=silent)
    own = store(root)
    own.features(photos, progress=silent)
    own.forget_others(photos[1:])
    left = {path.name.split("-")[1][:1] for path in (root.parent / "cache").iterdir()}
    assert left == {own.extractor.digest[0], "c"}
    for path in (root.parent / "cache").iterdir():
        assert bytes.fromhex(photos[0].digest) not in path.read_bytes()
    kept = store(root)
    np.testing.assert_allclose(kept.features(photos[1:], progress=silent), expected(photos[1:]), atol=1e-6)
    assert kept.extractor.prepared == []


def test_a_failed_write_leaves_the_old_cache_and_no_debris(root, monkeypatch):
    photos = make_photos(root, 3)
    store(root).features(photos[:2], progress=silent)
    before = cache_file(root).read_bytes()

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.os, "fsync", full_disk)
    with pytest.raises(CacheUnavailable, match="No space left on device; free space"):
        store(root).features(photos, progress=silent)
    assert cache_file(root).read_bytes() == before


def test_no_photos_have_no_features_and_make_no_file(root):
    assert store(root).features([], progress=silent).shape == (0, 3)
    assert not (root.parent / "cache").exists()


class Broken(Means):
    def extract(self, batch):
        return np.full((len(batch), 3), np.nan, dtype=np.float32)


class Wide(Means):
    def extract(self, batch):
        return np.zeros((len(batch), 4), dtype=np.float32)


@pytest.mark.parametrize("extractor", [Broken(), Wide()])
def test_features_that_cannot_be_right_are_refused_and_not_kept(root, extractor):
    with pytest.raises(DataRefused, match=r"float32 \(2, 3\) is expected"):
        store(root, extractor=extractor).features(make_photos(root, 2), progress=silent)
    assert not (root.parent / "cache").exists()
