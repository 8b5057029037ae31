from dataclasses import dataclass

import numpy as np
import pytest

from fedgrade.model.spec import VIEWS
from fedgrade.model.views import ViewedExtractor, seen

PHOTO = np.arange(6, dtype=np.float32).reshape(1, 2, 3)


@dataclass
class Flat:
    """An extractor whose features are the input itself."""

    digest: str = "a" * 64
    dimensions: int = 6

    def prepare(self, image):
        return image

    def extract(self, batch):
        return batch.reshape(len(batch), -1)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("upright", [[0, 1, 2], [3, 4, 5]]),
        ("flip_horizontal", [[2, 1, 0], [5, 4, 3]]),
        ("flip_vertical", [[3, 4, 5], [0, 1, 2]]),
        ("rotate_180", [[5, 4, 3], [2, 1, 0]]),
    ],
)
def test_a_view_moves_pixels_and_changes_none(view, expected):
    np.testing.assert_array_equal(seen(PHOTO, view), [expected])
    np.testing.assert_array_equal(seen(seen(PHOTO, view), view), PHOTO)


def test_a_batch_is_seen_photo_by_photo():
    batch = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)
    for view in VIEWS:
        np.testing.assert_array_equal(seen(batch, view), np.stack([seen(photo, view) for photo in batch]))


def test_features_of_every_view_have_a_digest_of_their_own_and_upright_ones_that_of_the_extractor():
    viewed = {view: ViewedExtractor(extractor=Flat(), view=view) for view in VIEWS}
    assert len({extractor.digest for extractor in viewed.values()}) == len(VIEWS)
    assert viewed["upright"].digest == Flat().digest
    turned = viewed["rotate_180"]
    assert turned.extract(turned.prepare(PHOTO)[None]).tolist() == [[5, 4, 3, 2, 1, 0]]
    assert turned.dimensions == 6
