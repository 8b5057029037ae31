import hashlib

import numpy as np
import pytest

from fedgrade.model.starting import parameter, uniform


def test_a_starting_point_is_the_same_for_ever():
    # Where this changes, every signed release that was trained from the starting point becomes another model.
    raw = uniform("adapter (2, 3)", (2, 3), bound=1.0).tobytes()
    assert hashlib.sha256(raw).hexdigest() == "a1cbe376ced2a63148e5939187cbf57cc04a6133c66e76f15658d77582afc335"


def test_numbers_are_spread_evenly_within_their_bound():
    numbers = uniform("spread", (200, 500), bound=0.5)
    assert numbers.dtype == np.float32
    assert -0.5 <= numbers.min() < -0.4999
    assert 0.4999 < numbers.max() <= 0.5
    assert abs(numbers.mean()) < 5 * 0.5 / np.sqrt(3 * numbers.size)
    assert numbers.var() == pytest.approx(0.25 / 3, rel=0.02)
    assert len(np.unique(numbers)) > 0.99 * numbers.size


def test_other_names_give_other_numbers():
    one, other = (uniform(name, (1000,), bound=1.0) for name in ("one", "other"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.16


def test_norms_start_as_the_identity_and_kernels_keep_the_size_of_what_passes():
    np.testing.assert_array_equal(parameter("bn1.weight", (4,)), np.ones(4))
    np.testing.assert_array_equal(parameter("bn1.bias", (4,)), np.zeros(4))
    kernel = parameter("conv1.weight", (64, 16, 3, 3))
    assert kernel.var() == pytest.approx(2 / (16 * 9), rel=0.05)
