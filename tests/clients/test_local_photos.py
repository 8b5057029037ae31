"""A partner's photos on disk: what is cached beforehand, what is read when a network wants it."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from clients import configure
from clients.configure import LocalPhotos
from clients.kept_inputs import KeptInputs
from clients.settings import read_site
from fedgrade.data.manifest import Split
from fedgrade.data.photos import PhotoLimits, open_photo
from fedgrade.errors import DataRefused
from fedgrade.model.preprocessing import prepare
from fedgrade.model.views import seen
from tests.federation.small_federation import MODEL
from tests.federation.small_photos import write_photos

EXAMPLE = Path(configure.__file__).parent / "site.example.yaml"
ADAPTER = replace(MODEL, input_size=64, trainable="adapter", views=("upright", "flip_horizontal", "rotate_180"))


@dataclass
class Corners:
    """A whole extractor that a test can follow by hand: the upper left pixel of each colour."""

    digest: str = "c" * 64
    dimensions: int = 3
    extracted: list[int] = field(default_factory=list)

    def prepare(self, image):
        return prepare(image, ADAPTER.input_size)

    def extract(self, batch):
        self.extracted.append(len(batch))
        return np.ascontiguousarray(batch[:, :, 0, 0])


@pytest.fixture
def extractor(monkeypatch):
    corners = Corners()
    monkeypatch.setattr(configure, "_extractor", lambda *_: corners)
    return corners


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos", first=0)


@pytest.fixture
def local(tmp_path, photos):  # noqa: ARG001 - the photos must be there
    settings = yaml.safe_load(EXAMPLE.read_text())
    settings.update(photos="photos", device="cpu", threads=1)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(settings))
    return LocalPhotos(site=read_site(tmp_path / "site.yaml"))


def test_before_a_job_every_photo_is_seen_upright_and_training_photos_in_every_view(local, photos, extractor):
    training = [photo for photo in photos if photo.split is Split.TRAIN]
    local.prepare(ADAPTER, photos)
    assert sum(extractor.extracted) == len(photos) + 2 * len(training)
    extractor.extracted.clear()
    for view in ADAPTER.views:
        local.features(ADAPTER, training, view)
    local.features(ADAPTER, photos, "upright")
    assert extractor.extracted == [], "all of it was cached"


def test_a_network_needs_no_features_but_upright_ones(local, photos, extractor):
    local.prepare(replace(ADAPTER, trainable="norms"), photos)
    assert sum(extractor.extracted) == len(photos)


def test_features_of_a_view_are_those_of_the_turned_photo(local, photos, extractor):
    for view in ADAPTER.views:
        expected = extractor.extract(seen(local.inputs(ADAPTER, photos), view))
        np.testing.assert_array_equal(local.features(ADAPTER, photos, view), expected)


def test_inputs_are_those_of_the_photos_in_the_order_that_was_asked_for(local, photos, tmp_path):
    chosen = [photos[3], photos[0]]
    pixels = [open_photo(tmp_path / "photos", photo, PhotoLimits()) for photo in chosen]
    expected = np.stack([prepare(image, ADAPTER.input_size) for image in pixels])
    np.testing.assert_array_equal(local.inputs(ADAPTER, chosen), expected)
    np.testing.assert_array_equal(local.inputs(ADAPTER, chosen[::-1]), expected[::-1])


def test_a_photo_that_was_opened_is_kept_and_one_that_changed_before_is_refused(local, photos, tmp_path):
    expected = local.inputs(ADAPTER, photos[:1])
    for photo in photos[:2]:
        (tmp_path / "photos" / photo.path).write_bytes(b"another photo")
    np.testing.assert_array_equal(local.inputs(ADAPTER, photos[:1]), expected)
    with pytest.raises(DataRefused, match=photos[1].path):
        local.inputs(ADAPTER, photos[:2])
    with pytest.raises(DataRefused, match=photos[0].path):
        local.inputs(replace(ADAPTER, input_size=96), photos[:1])


def test_no_more_is_kept_than_the_limit_and_nothing_of_a_photo_that_left_the_manifest():
    kept, opened = KeptInputs(limit=2 * 4 * 3), []

    def read(digest):
        return kept.input(digest, 1, lambda: opened.append(digest) or np.zeros((3, 1, 1), dtype=np.float32))

    for digest in "abcabc":
        read(digest)
    assert opened == ["a", "b", "c", "c"]
    kept.forget_others(["b"])
    for digest in "abc":
        read(digest)
    assert opened[4:] == ["a", "c"]
    assert repr(kept) == "KeptInputs(<sensitive>)"


def test_networks_run_on_what_the_partner_gives(local):
    assert (local.compute.device, local.compute.threads) == ("cpu", 1)
