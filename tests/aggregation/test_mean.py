from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgrade.aggregation.mean import (
    AggregationSpec,
    ServerState,
    add_update,
    descend,
    final_weights,
    mean_of_total,
    mean_of_updates,
    sum_of_releases,
)
from fedgrade.errors import JobRefused, ModelRefused
from fedgrade.privacy.grid import grid_rows
from fedgrade.trust.records import DiscreteGaussian

SPEC = AggregationSpec(learning_rate=0.5, momentum=0.9, average_last=0.5, minimum_sites=2)
MECHANISM = DiscreteGaussian(sensitivity=2**20, scale=1)

releases = st.lists(arrays.arrays(np.int64, 4, elements=st.integers(-(2**55), 2**55)), min_size=1, max_size=5)
shares = st.integers(1, 99).map(lambda hundredths: hundredths / 100)


# --- sums and means -----------------------------------------------------------------------------------------------


@given(releases, st.randoms(use_true_random=False))
def test_the_sum_of_releases_is_exact_and_of_no_order(parts, random):
    shuffled = list(parts)
    random.shuffle(shuffled)
    exact = [sum(int(part[entry]) for part in parts) for entry in range(4)]
    assert sum_of_releases(parts).tolist() == sum_of_releases(shuffled).tolist() == exact


def test_two_sites_mean_by_hand():
    # Clip 2, grid 8: one cell is 1/4. Sums (12, -8) and (4, 0) of 3 and 1 declared items: (16, -8)/4/4 = (1, -0.5).
    mechanism = DiscreteGaussian(sensitivity=8, scale=1)
    parts = [np.array([12, -8]), np.array([4, 0])]
    mean = mean_of_total(sum_of_releases(parts), max_norm=2.0, mechanism=mechanism, declared_items=4)
    assert mean.tolist() == [1.0, -0.5]


@given(arrays.arrays(np.float64, (6, 3), elements=st.floats(-1, 1)), st.integers(1, 5))
def test_how_items_are_spread_over_sites_does_not_change_the_mean(rows, split):
    grid = grid_rows(rows, max_norm=2.0, mechanism=MECHANISM)
    apart = [grid[:split].sum(axis=0), grid[split:].sum(axis=0)]
    arguments = {"max_norm": 2.0, "mechanism": MECHANISM, "declared_items": 6}
    together = mean_of_total(grid.sum(axis=0), **arguments)
    np.testing.assert_array_equal(mean_of_total(sum_of_releases(apart), **arguments), together)
    np.testing.assert_allclose(together, rows.mean(axis=0), atol=1e-5)


def test_updates_weigh_as_much_as_their_declared_items():
    updates = [(np.array([1.0, 0.0]), 30), (np.array([0.0, 4.0]), 10)]
    np.testing.assert_allclose(mean_of_updates(updates), [0.75, 1.0])


@pytest.mark.parametrize("parts", [[], [np.zeros(2, dtype=np.int64), np.zeros(3, dtype=np.int64)]])
def test_nothing_or_two_shapes_have_no_sum(parts):
    with pytest.raises(ModelRefused, match="all of one shape"):
        sum_of_releases(parts)


def test_no_updates_have_no_mean():
    with pytest.raises(ModelRefused, match="at least one update"):
        mean_of_updates([])


# --- steps --------------------------------------------------------------------------------------------------------


def test_two_steps_with_momentum_by_hand():
    state = ServerState.start(np.array([1.0, 0.0]))
    state = descend(state, np.array([2.0, -1.0]), spec=SPEC, round_index=0, rounds=4)
    np.testing.assert_allclose(state.weights, [0.0, 0.5])
    state = descend(state, np.array([1.0, 0.0]), spec=SPEC, round_index=1, rounds=4)
    # Velocity 0.9 * (2, -1) + (1, 0) = (2.8, -0.9), half of which is taken off.
    np.testing.assert_allclose(state.velocity, [2.8, -0.9])
    np.testing.assert_allclose(state.weights, [-1.4, 0.95])
    assert state.averaged == 0
    np.testing.assert_array_equal(final_weights(state), state.weights)


def run(rounds, average_last):
    spec = AggregationSpec(learning_rate=1.0, momentum=0.0, average_last=average_last, minimum_sites=1)
    state, iterates = ServerState.start(np.zeros(2)), []
    for round_index in range(rounds):
        gradient = np.array([-1.0, (-1.0) ** round_index])
        state = descend(state, gradient, spec=spec, round_index=round_index, rounds=rounds)
        iterates.append(state.weights)
    return state, iterates


@given(st.integers(1, 40), shares | st.just(1.0))
def test_what_is_released_is_the_mean_of_the_last_iterates(rounds, average_last):
    state, iterates = run(rounds, average_last)
    # The rounds that lie wholly within the last part, as whole numbers say it.
    kept = int(rounds * Fraction(str(average_last)))
    assert state.averaged == kept
    expected = np.mean(iterates[rounds - kept :], axis=0) if kept else iterates[-1]
    np.testing.assert_allclose(final_weights(state), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("rounds", "share", "kept"), [(10, 0.7, 7), (10, 0.3, 3), (5, 0.2, 1), (3, 0.1, 0), (4, 1.0, 4)]
)
def test_seven_tenths_of_ten_rounds_are_seven(rounds, share, kept):
    assert run(rounds, share)[0].averaged == kept


def test_an_update_moves_the_weights_by_itself_and_is_averaged_too():
    state = ServerState.start(np.array([1.0, 2.0]))
    for round_index in range(2):
        state = add_update(state, np.array([1.0, -1.0]), spec=SPEC, round_index=round_index, rounds=2)
    np.testing.assert_allclose(state.weights, [3.0, 0.0])
    np.testing.assert_allclose(final_weights(state), [3.0, 0.0])
    assert state.averaged == 1


def test_a_step_leaves_the_state_before_it_as_it_was():
    state = ServerState.start(np.array([1.0, 0.0]))
    descend(state, np.array([2.0, -1.0]), spec=SPEC, round_index=3, rounds=4)
    assert state.weights.tolist() == [1.0, 0.0]
    assert not state.velocity.any()
    assert not state.average.any()
    assert state.averaged == 0


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("learning_rate", (0.0, -1.0, np.inf, np.nan)),
        ("momentum", (-0.1, 1.0, np.nan)),
        ("average_last", (0.0, 1.1, -1.0, np.nan)),
        ("minimum_sites", (0, -1)),
    ],
)
def test_an_impossible_step_is_refused_by_name(field, values):
    for value in values:
        with pytest.raises(JobRefused, match=rf"aggregation\.{field}: {value} must be"):
            AggregationSpec(**{**vars(SPEC), field: value})
