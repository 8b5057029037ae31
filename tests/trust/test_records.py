from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.records import DiscreteGaussian, LedgerState, PoissonGaussian


@given(st.integers(1, 2**60), st.integers(1, 2**60))
def test_the_cost_of_integer_noise_is_exact(sensitivity, scale):
    rho = DiscreteGaussian(sensitivity=sensitivity, scale=scale).rho
    assert rho * 2 * scale * scale == sensitivity * sensitivity


@given(
    st.fractions(min_value="1/1000000", max_value=1),
    st.fractions(min_value="1/1000000"),
    st.integers(1),
    st.integers(0),
)
def test_a_poisson_mechanism_survives_the_wire_exactly(rate, noise, steps, more):
    mechanism = PoissonGaussian(sampling_rate=rate, noise_multiplier=noise, steps=steps, planned_steps=steps + more)
    assert decode(PoissonGaussian, encode(mechanism)) == mechanism


@pytest.mark.parametrize(("sensitivity", "scale"), [(0, 1), (1, 0), (-1, 1), (1, -1)])
def test_noise_zero_is_no_mechanism(sensitivity, scale):
    with pytest.raises(DocumentRefused, match="must both be at least 1"):
        DiscreteGaussian(sensitivity=sensitivity, scale=scale)


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "planned"),
    [
        ("0", "1", 1, 1), ("3/2", "1", 1, 1), ("-1", "1", 1, 1), ("1", "0", 1, 1), ("1", "-1", 1, 1), ("1", "1", 0, 1),
        ("1", "1", 2, 1), ("1", "1", 1, 0), ("1", "1", 1, -1),
    ],
)  # fmt: skip
def test_an_impossible_poisson_mechanism_is_refused_even_on_the_wire(rate, noise, steps, planned):
    with pytest.raises(DocumentRefused, match="mechanism"):
        PoissonGaussian(
            sampling_rate=Fraction(rate), noise_multiplier=Fraction(noise), steps=steps, planned_steps=planned
        )
    raw = (
        f'{{"kind":"poisson_gaussian","sampling_rate":"{rate}","noise_multiplier":"{noise}","steps":{steps},'
        f'"planned_steps":{planned}}}'
    )
    with pytest.raises(DocumentRefused, match="mechanism"):
        decode(PoissonGaussian, raw.encode())


@pytest.mark.parametrize(("entries", "root"), [(0, "a" * 64), (-1, "a" * 64), (1, "A" * 64), (1, "a" * 63), (1, "")])
def test_a_ledger_without_an_entry_or_a_root_stands_nowhere(entries, root):
    with pytest.raises(DocumentRefused, match="ledger state"):
        LedgerState(entries=entries, root=root)
