from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgrade.errors import JobRefused
from fedgrade.grading import MAX_GRADES, GradeScale, decide, expected_costs

SCALE = GradeScale(
    name="three", labels=("A", "B", "C"), critical=("C",), cost=((0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (4.0, 2.0, 0.0))
)


@st.composite
def scales(draw):
    grades = draw(st.integers(2, 6))
    prices = draw(arrays.arrays(np.float64, (grades, grades), elements=st.floats(0, 1e6)))
    np.fill_diagonal(prices, 0.0)
    labels = tuple(f"G{grade}" for grade in range(grades))
    return GradeScale(name="any", labels=labels, critical=labels[-1:], cost=tuple(map(tuple, prices.tolist())))


def chances(grades):
    rows = arrays.arrays(np.float64, st.tuples(st.integers(0, 5), st.just(grades)), elements=st.floats(1e-3, 1))
    return rows.map(lambda table: table / table.sum(axis=1, keepdims=True))


scales_and_chances = scales().flatmap(lambda scale: st.tuples(st.just(scale), chances(scale.grades)))


@given(scales_and_chances)
def test_no_other_grade_is_cheaper_than_the_decision(case):
    scale, probabilities = case
    for row, decided in zip(probabilities, decide(probabilities, scale), strict=True):
        prices = [sum(row[true] * scale.cost[true][grade] for true in range(scale.grades)) for grade in row.argsort()]
        paid = sum(row[true] * scale.cost[true][decided] for true in range(scale.grades))
        assert paid <= min(prices) * (1 + 1e-12)


@given(scales())
def test_a_certain_item_gets_its_grade_unless_another_costs_nothing(scale):
    decided = decide(np.eye(scale.grades), scale)
    for true, grade in enumerate(decided):
        assert scale.cost[true][grade] == 0
        assert all(scale.cost[true][worse] > 0 for worse in range(grade + 1, scale.grades))


@given(st.integers(2, MAX_GRADES))
def test_when_every_decision_costs_the_same_the_worst_grade_is_taken(grades):
    labels = tuple(map(str, range(grades)))
    free = GradeScale(name="free", labels=labels, critical=(), cost=((0.0,) * grades,) * grades)
    assert decide(np.full((3, grades), 1 / grades), free).tolist() == [grades - 1] * 3


def test_a_tie_between_two_grades_goes_to_the_worse_of_them():
    even = replace(SCALE, cost=((0.0, 1.0, 9.0), (1.0, 0.0, 9.0), (9.0, 9.0, 0.0)))
    assert decide(np.array([[0.5, 0.5, 0.0]]), even).tolist() == [1]


def test_an_item_without_probabilities_is_graded_worst():
    assert decide(np.full((1, 3), np.nan), SCALE).tolist() == [2]


def test_expected_costs_by_hand():
    # Half of A's prices, three tenths of B's and a fifth of C's.
    np.testing.assert_allclose(expected_costs(np.array([[0.5, 0.3, 0.2]]), SCALE), [[1.1, 0.9, 1.3]])
    # The likeliest grade is A; B is the cheapest to be wrong about.
    assert decide(np.array([[0.5, 0.3, 0.2]]), SCALE).tolist() == [1]


def test_a_dearer_miss_makes_the_decision_more_careful():
    doubtful = np.array([[0.7, 0.1, 0.2]])
    cheap = replace(SCALE, cost=((0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)))
    dear = replace(SCALE, cost=((0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (50.0, 20.0, 0.0)))
    assert [decide(doubtful, scale)[0] for scale in (cheap, dear)] == [0, 2]


def test_no_items_have_no_decisions():
    assert decide(np.zeros((0, 3)), SCALE).shape == (0,)


def test_labels_have_places_on_the_scale():
    assert [SCALE.index(label) for label in SCALE.labels] == [0, 1, 2]
    assert (SCALE.grades, SCALE.critical_indices) == (3, (2,))
    assert SCALE.cost_matrix.tolist() == [list(row) for row in SCALE.cost]
    with pytest.raises(JobRefused, match=r"grade 'D' is not one of \['A', 'B', 'C'\]"):
        SCALE.index("D")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"labels": ("A",)}, "grading.labels: 1 grades; a scale has 2 to 32"),
        ({"labels": tuple(map(str, range(MAX_GRADES + 1)))}, "grading.labels: 33 grades; a scale has 2 to 32"),
        ({"labels": ("A", "B", "B")}, r"grading.labels: .* must be distinct and not empty"),
        ({"labels": ("A", " ", "C")}, r"grading.labels: .* must be distinct and not empty"),
        ({"critical": ("D",)}, r"grading.critical: 'D' is not one of \['A', 'B', 'C'\]"),
        ({"cost": SCALE.cost[:2]}, "grading.cost: must be 3 rows of 3 numbers, one per grade"),
        ({"cost": (*SCALE.cost[:2], (4.0, 2.0))}, "grading.cost: must be 3 rows of 3 numbers, one per grade"),
        ({"cost": ()}, "grading.cost: must be 3 rows of 3 numbers, one per grade"),
        *(
            ({"cost": (*SCALE.cost[:2], row)}, r"grading.cost\[2\]: costs are finite, not negative, and 0 for")
            for row in ((np.nan, 2.0, 0.0), (4.0, np.inf, 0.0), (4.0, -2.0, 0.0), (4.0, 2.0, 1.0), (4.0, 2.0, np.nan))
        ),
    ],
)
def test_an_impossible_scale_is_refused_in_one_line(change, complaint):
    with pytest.raises(JobRefused, match=f"^{complaint}") as refusal:
        replace(SCALE, **change)
    assert "\n" not in str(refusal.value)
