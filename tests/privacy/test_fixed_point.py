import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgrade.errors import ModelRefused
from fedgrade.privacy.fixed_point import MAX_PHOTOS, FixedPointPhotos, fixed_point_thresholds

hostile = st.sampled_from([0.0, np.nan, np.inf, -np.inf, 1e308, -1e308, 1e154, 5e-324, 1.0]) | st.floats(width=64)
batches = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6)).flatmap(
    lambda shape: arrays.arrays(np.float64, shape, elements=hostile)
)


def fields(photos):
    return photos.integers, photos.exponents, photos.products, photos.finite


def in_python(photos):
    """The integers [items, photos, features] as Python's."""
    return photos.integers.astype(np.float64).astype(np.int64).astype(object)


@given(batches)
def test_whatever_comes_in_integers_are_bounded_and_inner_products_exact(inputs):
    photos = FixedPointPhotos.of(inputs)
    integers = in_python(photos)
    products = (integers[:, :, None] * integers[:, None, :]).sum(axis=3)
    assert photos.products.tolist() == products.tolist()
    lengths = products.diagonal(axis1=1, axis2=2)
    assert all(length == 0 or 2**39 < length < 2**44 for length in lengths.ravel())
    np.testing.assert_array_equal(photos.finite, np.isfinite(inputs).all(axis=(1, 2)))
    assert not photos.integers[~photos.finite].any()


@given(batches)
def test_every_number_is_right_to_half_an_integer(inputs):
    photos = FixedPointPhotos.of(inputs)
    kept = np.where(photos.finite[:, None, None], inputs, 0.0)
    apart = np.abs(np.ldexp(kept, -photos.exponents[:, :, None]) - photos.integers)
    assert apart.max() <= 0.5 or not kept.any()
    zero = ~kept.any(axis=2)
    assert not photos.integers[zero].any()
    assert (photos.exponents[zero] < -5000).all(), "so that no other photo is measured against it"


@given(batches, st.data())
def test_what_is_kept_of_an_item_is_its_own_to_the_last_bit(inputs, data):
    order = data.draw(st.permutations(range(len(inputs))))
    whole = FixedPointPhotos.of(inputs)
    for of_order, of_whole in zip(fields(FixedPointPhotos.of(inputs[order])), fields(whole), strict=True):
        np.testing.assert_array_equal(of_order, of_whole[order])
    for item in range(len(inputs)):
        alone = FixedPointPhotos.of(inputs[item : item + 1])
        for of_item, of_whole in zip(fields(alone), fields(whole.take(slice(item, item + 1))), strict=True):
            np.testing.assert_array_equal(of_item, of_whole)


@pytest.mark.parametrize(("items", "features"), [(700, 3841), (3, 20_000), (5, 2**17)])
def test_long_vectors_are_measured_in_integers_too(items, features):
    inputs = np.random.default_rng(0).normal(size=(items, 1, features))
    inputs /= np.linalg.norm(inputs, axis=2, keepdims=True)
    photos = FixedPointPhotos.of(inputs)
    squares = np.array([np.dot(row, row) for row in in_python(photos)[:, 0][:9]], dtype=float)
    np.testing.assert_allclose(np.sqrt(squares) * 2.0 ** photos.exponents[:9, 0], 1.0, rtol=1e-5)
    assert set(np.unique(photos.exponents)) <= {-21, -20}, "a length of one is on the border of two"


def test_a_unit_vector_with_its_bias_is_in_millionths():
    inputs = np.array([[[0.6, 0.8, 0.3], [0.0, 0.0, 0.3]]])
    photos = FixedPointPhotos.of(inputs)
    assert photos.exponents.tolist() == [[-20, -22]]
    assert photos.integers[0].tolist() == [[629146, 838861, 314573], [0, 0, 1258291]]


def test_items_with_more_photos_than_sums_hold_are_refused():
    FixedPointPhotos.of(np.zeros((1, MAX_PHOTOS, 0)))
    with pytest.raises(ModelRefused, match=r"^item batch: 4097 photos and views of one item; the limit is 4096$"):
        FixedPointPhotos.of(np.zeros((1, MAX_PHOTOS + 1, 0)))


def test_it_does_not_show_its_items():
    assert repr(FixedPointPhotos.of(np.ones((1, 1, 1)))) == "FixedPointPhotos(<sensitive>)"


@given(arrays.arrays(np.float64, (3, 9), elements=hostile))
def test_thresholds_are_right_to_a_millionth_of_their_largest_and_short_enough(thresholds):
    integers, exponents = fixed_point_thresholds(thresholds)
    for row, whole, exponent in zip(thresholds, integers, exponents, strict=True):
        if not np.isfinite(row).all():
            assert np.isnan(whole).all()
            continue
        assert sum(int(number) ** 2 for number in whole) <= 4**30
        np.testing.assert_array_equal(whole, np.rint(whole))
        assert np.abs(np.ldexp(row, -exponent) - whole).max() <= 0.5
        assert not row.any() or np.abs(whole).max() >= 2**20
