import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.data.manifest import Split
from fedgrade.data.splits import assign_splits, keyed_order
from fedgrade.errors import DataRefused

KEY = b"sixteen bytes or more"

source_sets = st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=30)
fractions = st.floats(0.01, 0.99)


@given(source_sets, fractions, st.randoms())
def test_the_order_in_which_sources_are_named_does_not_matter(sources, fraction, rng):
    shuffled = sorted(sources)
    rng.shuffle(shuffled)
    assert assign_splits(shuffled, key=KEY, test_fraction=fraction) == assign_splits(
        sorted(sources), key=KEY, test_fraction=fraction
    )


@given(source_sets, fractions)
def test_every_source_has_a_side_and_no_side_is_empty(sources, fraction):
    sides = assign_splits(sources, key=KEY, test_fraction=fraction)
    assert sides.keys() == sources
    tested = sum(side is Split.TEST for side in sides.values())
    assert 1 <= tested <= len(sources) - 1
    assert tested == min(max(1, round(fraction * len(sources))), len(sources) - 1)


@given(source_sets, fractions, st.integers(2, 5))
def test_tied_sources_stay_together(sources, fraction, size):
    together = frozenset(random.Random(0).sample(sorted(sources), min(size, len(sources))))  # noqa: S311 - no secret
    sides = assign_splits(sources, key=KEY, test_fraction=fraction, tied=[together])
    assert sides.keys() == sources
    assert len({sides[source] for source in together}) == 1


@given(source_sets)
def test_ties_that_share_a_source_are_one_tie_in_whatever_order_they_come(sources):
    names = sorted(sources)
    pairs = [frozenset(names[i : i + 2]) for i in range(len(names) - 1)]
    assert keyed_order(names, key=KEY, tied=pairs) == (frozenset(names),)
    assert keyed_order(names, key=KEY, tied=pairs[::-1]) == (frozenset(names),)


def test_a_single_source_trains_and_none_has_no_sides():
    assert assign_splits(["only"], key=KEY, test_fraction=0.5) == {"only": Split.TRAIN}
    assert assign_splits([], key=KEY, test_fraction=0.5) == {}


def test_another_key_deals_otherwise():
    sources = [f"module-{number}" for number in range(40)]
    assert assign_splits(sources, key=KEY, test_fraction=0.5) != assign_splits(
        sources, key=KEY + b"!", test_fraction=0.5
    )


def test_the_draw_is_the_one_it_was():
    # Splits hold for the life of the data: a change here would move items between two privacy accounts.
    sides = assign_splits([f"module-{number}" for number in range(8)], key=KEY, test_fraction=0.25)
    assert sorted(source for source, side in sides.items() if side is Split.TEST) == ["module-1", "module-5"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction):
    with pytest.raises(DataRefused, match="between 0 and 1"):
        assign_splits(["a", "b"], key=KEY, test_fraction=fraction)


def test_a_short_key_is_refused():
    with pytest.raises(DataRefused, match="at least 16"):
        assign_splits(["a", "b"], key=b"short", test_fraction=0.5)


def test_a_tie_to_an_unknown_source_is_refused():
    with pytest.raises(DataRefused, match="tied source 'c'"):
        assign_splits(["a", "b"], key=KEY, test_fraction=0.5, tied=[frozenset({"a", "c"})])
