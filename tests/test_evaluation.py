import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgrade.errors import ModelRefused
from fedgrade.evaluation import ConfusionCounts, GradingMetrics, item_rows, metrics, quadratic_weighted_kappa
from fedgrade.grading import GradeScale

SCALE = GradeScale(
    name="three", labels=("A", "B", "C"), critical=("C",), cost=((0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (4.0, 2.0, 0.0))
)
NOTHING = GradingMetrics(quadratic_weighted_kappa=0.0, accuracy=0.0, critical_miss_rate=0.0, mean_cost=0.0, items=0.0)
# What sites release: whole cells of the grid, a 1024th of an item each, negative where the noise was.
noised = arrays.arrays(np.int64, (3, 3), elements=st.integers(-(2**30), 2**30)).map(lambda cells: cells / 1024)
noised_counts = noised.map(ConfusionCounts.of)
graded = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12)


def table_of(pairs, grades):
    table = np.zeros((grades, grades))
    for true, decided in pairs:
        table[true, decided] += 1
    return table


def kappa_by_pairs(pairs):
    """1 - mean squared distance of an item's two grades / the same over all pairs of one item's truth, another's fate.

    Straight from the definition, without a table.
    """
    seen = sum((true - decided) ** 2 for true, decided in pairs) / len(pairs)
    chance = sum((true - decided) ** 2 for true, _ in pairs for _, decided in pairs) / len(pairs) ** 2
    return 1 - seen / chance if chance else 0.0


@given(noised_counts, noised_counts, noised_counts)
def test_merging_sites_depends_neither_on_order_nor_on_grouping(a, b, c):
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


@given(noised_counts)
def test_merging_with_nothing_changes_nothing(counts):
    assert counts.merge(ConfusionCounts.zero(3)) == ConfusionCounts.zero(3).merge(counts) == counts


@given(noised)
def test_counts_give_back_their_table(table):
    np.testing.assert_array_equal(ConfusionCounts.of(table).table, table)


@given(graded, graded)
def test_sites_merged_are_the_items_together(here, there):
    together = ConfusionCounts.of(table_of(here, 4)).merge(ConfusionCounts.of(table_of(there, 4)))
    np.testing.assert_array_equal(together.table, table_of(here + there, 4))


@given(graded)
def test_kappa_is_its_definition_over_pairs_of_items(pairs):
    found = quadratic_weighted_kappa(table_of(pairs, 4))
    assert math.isclose(found, kappa_by_pairs(pairs), rel_tol=1e-12, abs_tol=1e-12)


@given(noised)
def test_metrics_of_any_noised_table_are_within_their_bounds(table):
    found = metrics(ConfusionCounts.of(table), SCALE)
    assert -1 - 1e-9 <= found.quadratic_weighted_kappa <= 1 + 1e-9
    assert 0 <= found.accuracy <= 1 + 1e-12
    assert 0 <= found.critical_miss_rate <= 1 + 1e-12
    assert 0 <= found.mean_cost <= SCALE.cost_matrix.max() * (1 + 1e-12)
    assert found.items == np.maximum(table, 0).sum()


@given(noised)
def test_a_negative_count_is_as_good_as_none(table):
    clamped = ConfusionCounts.of(np.maximum(table, 0))
    assert metrics(ConfusionCounts.of(table), SCALE) == metrics(clamped, SCALE)


@given(graded, st.integers(1, 50))
def test_kappa_neither_depends_on_the_number_of_items_nor_on_who_is_called_right(pairs, times):
    table = table_of(pairs, 4)
    kappa = quadratic_weighted_kappa(table)
    assert math.isclose(kappa, quadratic_weighted_kappa(times * table), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(kappa, quadratic_weighted_kappa(table.T), rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        ([[5, 0], [0, 5]], 1.0),
        ([[0, 5], [5, 0]], -1.0),
        ([[1, 1], [1, 1]], 0.0),
        # Distances squared sum to 1 of 3 items; by chance (2*1 + 1*2) / 3 = 5/3: 1 - 1 / (5/3).
        ([[1, 1], [0, 1]], 0.4),
        # Seen 1 + 4 = 5; rows (3, 1, 2), columns (2, 2, 2): chance (3*2*1 + 3*2*4 + 2 + 2 + 2*2*4 + 2*2*1) / 6 = 9.
        ([[2, 1, 0], [0, 1, 0], [0, 0, 2]], 1 - 1 / 9),
        ([[3, 0], [0, 0]], 0.0),  # one grade only: chance agrees too, and kappa is not defined
        ([[0, 3], [0, 0]], 0.0),
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_kappa_by_hand(table, kappa):
    assert quadratic_weighted_kappa(np.array(table, dtype=np.float64)) == pytest.approx(kappa, abs=1e-12)


def test_metrics_by_hand():
    table = np.array([[4.0, 1.0, 0.0], [2.0, 6.0, 1.0], [1.0, 2.0, 3.0]])
    found = metrics(ConfusionCounts.of(table), SCALE)
    assert found.items == 20
    assert found.accuracy == pytest.approx(13 / 20)
    assert found.critical_miss_rate == pytest.approx(3 / 6)  # of six C, one went as A and two as B
    assert found.mean_cost == pytest.approx((1 * 1 + 2 * 1 + 1 * 1 + 1 * 4 + 2 * 2) / 20)


def test_a_site_is_not_clamped_before_it_is_merged():
    low, high = (ConfusionCounts.of(np.diag([cell, 1.0, 1.0])) for cell in (-3.0, 5.0))
    assert metrics(low.merge(high), SCALE).items == 2 + 2 + 2


def test_a_critical_item_graded_worse_or_as_another_critical_grade_is_no_miss():
    two_critical = GradeScale(name="three", labels=("A", "B", "C"), critical=("C", "B"), cost=SCALE.cost)
    table = np.array([[9.0, 9.0, 9.0], [1.0, 2.0, 3.0], [2.0, 4.0, 8.0]])
    assert metrics(ConfusionCounts.of(table), two_critical).critical_miss_rate == pytest.approx((1 + 2) / (6 + 14))
    middle = GradeScale(name="three", labels=("A", "B", "C"), critical=("B",), cost=SCALE.cost)
    assert metrics(ConfusionCounts.of(table), middle).critical_miss_rate == pytest.approx(1 / 6)


def test_nothing_critical_seen_or_named_is_nothing_missed():
    table = np.array([[4.0, 1.0, 0.0], [2.0, 6.0, 1.0], [0.0, -1.0, 0.0]])
    assert metrics(ConfusionCounts.of(table), SCALE).critical_miss_rate == 0.0
    careless = GradeScale(name="three", labels=("A", "B", "C"), critical=(), cost=SCALE.cost)
    assert metrics(ConfusionCounts.of(table), careless).critical_miss_rate == 0.0


@pytest.mark.parametrize("cell", [0.0, -0.0, -7.25])
def test_an_empty_table_has_metrics_of_zero(cell):
    assert metrics(ConfusionCounts.of(np.full((3, 3), cell)), SCALE) == NOTHING


@given(graded)
def test_an_item_is_one_cell_of_length_one(pairs):
    true, decided = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    rows = item_rows(true, decided, grades=4)
    assert (np.linalg.norm(rows, axis=1) == 1.0).all()
    np.testing.assert_array_equal(rows.sum(axis=0).reshape(4, 4), table_of(pairs, 4))
    assert Counter(zip(*np.divmod(rows.argmax(axis=1), 4), strict=True)) == Counter(pairs)


def test_no_items_have_no_rows():
    nobody = np.zeros(0, dtype=np.int64)
    assert item_rows(nobody, nobody, grades=3).shape == (0, 9)


@pytest.mark.parametrize("counts", [(), ((),), ((1.0, 2.0),), ((1.0, 2.0), (3.0,)), ((1.0,), (2.0,))])
def test_a_table_that_is_not_square_is_refused(counts):
    with pytest.raises(ModelRefused, match=r"^confusion counts: a square table"):
        ConfusionCounts(counts=counts)


@pytest.mark.parametrize("count", [math.nan, math.inf, -math.inf])
def test_a_count_that_is_no_number_is_refused(count):
    with pytest.raises(ModelRefused, match=r"^confusion counts: every count must be finite"):
        ConfusionCounts(counts=((count, 0.0), (0.0, 1.0)))


def test_tables_of_different_scales_do_not_merge():
    with pytest.raises(ModelRefused, match="3 grades do not merge with 4"):
        ConfusionCounts.zero(3).merge(ConfusionCounts.zero(4))
