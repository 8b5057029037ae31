from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgrade.errors import PlanRefused
from fedgrade.privacy.grid import add_noise, clip_rows, from_grid, grid_rows
from fedgrade.trust.records import DiscreteGaussian

NASTY = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 1e-310, 2.0**-1022, 1e154, 1e-160, 1.0]
nasty = st.sampled_from(NASTY) | st.floats(width=64)
matrices = st.tuples(st.integers(0, 5), st.integers(0, 6)).flatmap(
    lambda shape: arrays.arrays(np.float64, shape, elements=nasty)
)
tame = arrays.arrays(np.float64, (4, 5), elements=st.floats(-1e6, 1e6))
clips = st.sampled_from([5e-324, 1e-320, 1e-305, 1e-160, 1e-3, 0.25, 1.0, 7.3, 1e10, 1e160, 1.7e308])
mechanisms = st.sampled_from([1, 2, 1000, 2**10, 2**20, 2**28]).map(
    lambda sensitivity: DiscreteGaussian(sensitivity=sensitivity, scale=1)
)
MECHANISM = DiscreteGaussian(sensitivity=2**20, scale=3)


def squared_norms(integers):
    """In Python's integers, which cannot overflow."""
    return [sum(int(entry) ** 2 for entry in row) for row in integers]


@given(matrices, clips, mechanisms)
@example(np.array([[1.0, 0.0], [np.nan, 1.0]]), 1e-305, MECHANISM)
@example(np.full((1, 6), 1e308), 1e-320, MECHANISM)
def test_no_row_is_longer_than_the_sensitivity_whatever_it_held(rows, max_norm, mechanism):
    integers = grid_rows(rows, max_norm=max_norm, mechanism=mechanism)
    assert integers.shape == rows.shape
    assert integers.dtype == np.int64
    assert all(squared <= mechanism.sensitivity**2 for squared in squared_norms(integers))


@given(matrices, clips, mechanisms, st.data())
def test_one_item_more_or_less_moves_the_sum_by_at_most_the_sensitivity(rows, max_norm, mechanism, data):
    if not len(rows):
        return
    left_out = data.draw(st.integers(0, len(rows) - 1))
    with_item = grid_rows(rows, max_norm=max_norm, mechanism=mechanism).sum(axis=0)
    without = grid_rows(np.delete(rows, left_out, axis=0), max_norm=max_norm, mechanism=mechanism).sum(axis=0)
    assert squared_norms([with_item - without])[0] <= mechanism.sensitivity**2


@given(matrices, clips)
def test_an_items_row_depends_on_that_item_alone(rows, max_norm):
    together = grid_rows(rows, max_norm=max_norm, mechanism=MECHANISM)
    alone = [grid_rows(rows[[number]], max_norm=max_norm, mechanism=MECHANISM)[0] for number in range(len(rows))]
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))


@given(matrices, clips)
def test_clipped_rows_are_within_the_clip_and_never_nan(rows, max_norm):
    clipped = clip_rows(rows, max_norm)
    assert np.isfinite(clipped).all()
    with np.errstate(under="ignore"):
        lengths = np.linalg.norm(clipped / max_norm, axis=1)
    # Denormal clips have few digits; the grid's exact check is what the guarantee rests on.
    assert (lengths <= (1 + 1e-12 if max_norm > 1e-290 else 2)).all()


@given(tame, st.floats(1e-3, 1e3))
def test_clipping_keeps_short_rows_and_every_direction(rows, max_norm):
    clipped = clip_rows(rows, max_norm)
    lengths = np.linalg.norm(rows, axis=1)
    short = lengths <= max_norm * (1 - 1e-12)
    np.testing.assert_allclose(clipped[short], rows[short], rtol=1e-12, atol=1e-300)
    expected = rows * (max_norm / np.maximum(lengths, max_norm))[:, None]
    np.testing.assert_allclose(clipped, expected, rtol=1e-9, atol=1e-12 * max_norm)


@given(tame, st.floats(1e-3, 1e3))
def test_the_grid_loses_less_than_a_cell_and_a_millionth(rows, max_norm):
    integers = grid_rows(rows, max_norm=max_norm, mechanism=MECHANISM)
    back = from_grid(integers, max_norm=max_norm, mechanism=MECHANISM)
    cell = max_norm / MECHANISM.sensitivity
    clipped = clip_rows(rows, max_norm)
    assert (np.abs(back - clipped) <= cell + np.abs(clipped) * 2.0**-19).all()
    assert (np.abs(back) <= np.abs(clipped)).all()


@pytest.mark.parametrize("bits", [10, 20, 40])
def test_sums_come_back_from_every_grid_in_units_of_the_clip(bits):
    mechanism, total = DiscreteGaussian(sensitivity=2**bits, scale=1), np.array([3, -(2**58) - 1, 2**bits])
    back = from_grid(total, max_norm=0.7, mechanism=mechanism)
    expected = [float(Fraction(int(number), 2**bits) * Fraction(7, 10)) for number in total]
    np.testing.assert_allclose(back, expected, rtol=1e-15)


def test_rows_by_hand():
    rows = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [np.nan, 9.0], [-np.inf, 0.0]])
    mechanism = DiscreteGaussian(sensitivity=1000, scale=1)
    assert grid_rows(rows, max_norm=1.0, mechanism=mechanism).tolist() == [
        [599, 799],
        [299, 399],
        [0, 0],
        [0, 0],
        [0, 0],
    ]


def test_a_grid_whose_norms_cannot_be_checked_in_64_bits_is_refused():
    for sensitivity, parameters in ((2**32, 1), (2**31, 4), (2**30, 9)):
        with pytest.raises(PlanRefused, match=r"must stay below 2\^63"):
            grid_rows(
                np.ones((1, parameters)), max_norm=1.0, mechanism=DiscreteGaussian(sensitivity=sensitivity, scale=1)
            )


@given(arrays.arrays(np.int64, st.integers(0, 8), elements=st.integers(-(2**61), 2**61)), st.integers(-(2**61), 2**61))
def test_noise_is_added_exactly(total, noise):
    noisy = add_noise(total, noise=np.full_like(total, noise))
    assert [int(entry) for entry in noisy] == [int(entry) + noise for entry in total]


@pytest.mark.parametrize(("total", "noise"), [((3,), (1,)), ((3,), ()), ((3,), (4,)), ((2, 3), (3,)), ((3,), (1, 3))])
def test_noise_that_does_not_cover_every_coordinate_is_refused(total, noise):
    with pytest.raises(PlanRefused, match="does not fit"):
        add_noise(np.zeros(total, dtype=np.int64), noise=np.zeros(noise, dtype=np.int64))
