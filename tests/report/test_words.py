from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.report.words import (
    area_text,
    count_text,
    counted,
    delta_text,
    epsilon_text,
    grouped,
    limit_text,
    noise_text,
    plain,
    rho_text,
    share_text,
)

RHO, TIMES = "\N{GREEK SMALL LETTER RHO}", "\N{MULTIPLICATION SIGN}"
_BACK = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


@given(st.floats(0.0, 1.0))
def test_risks_are_never_printed_lower_than_they_are(share):
    assert float(share_text(share).removesuffix(" %")) >= 100 * share - 1e-6
    assert float(area_text(share)) >= share - 1e-9
    assert float(epsilon_text(share)) >= share - 1e-9


@given(st.fractions(min_value=0, max_value=1000, max_denominator=10**6))
def test_noise_is_never_printed_higher_than_it_is(multiplier):
    assert Fraction(noise_text(multiplier).replace(",", "")) <= multiplier


@given(st.fractions(min_value=Fraction(1, 10**9), max_value=1, max_denominator=10**12))
def test_a_delta_is_never_printed_lower_than_it_is(delta):
    mantissa, _, power = delta_text(delta).rpartition("10")
    printed = Fraction(mantissa.strip(f" {TIMES}") or "1") * Fraction(10) ** int(power.translate(_BACK))
    assert delta <= printed <= delta * Fraction(102, 100)


@given(st.fractions(min_value=Fraction(1, 10**9), max_value=1000, max_denominator=10**12))
def test_a_rho_is_never_printed_lower_than_it_is(rho):
    printed = Fraction(repr(float(rho_text(rho).removeprefix(f"{RHO} = "))))
    assert rho * Fraction(999999, 1000000) <= printed <= rho * Fraction(1002, 1000)


@pytest.mark.parametrize("exponent", range(1, 10))
def test_powers_of_ten_are_spelt_as_such(exponent):
    assert delta_text(Fraction(1, 10**exponent)) == "10⁻" + "⁰¹²³⁴⁵⁶⁷⁸⁹"[exponent]


def test_numbers_are_spelt_as_a_document_spells_them():
    assert delta_text(Fraction(25, 10**7)) == f"2.5 {TIMES} 10⁻⁶"
    assert limit_text(Fraction(8)) == "8.00"
    assert limit_text(Fraction(1, 8)) == "0.125"
    assert count_text(-3.4) == "\N{MINUS SIGN}3"
    assert count_text(-0.4) == "0"
    assert counted(1, "entry") == "1 entry"
    assert counted(1200, "entry") == "1,200 entries"
    assert rho_text(Fraction(0)) == f"{RHO} = 0"


def test_a_fingerprint_reads_in_blocks_of_four():
    assert grouped("00ff" * 16).split() == ["00ff"] * 16


def test_other_peoples_names_are_cut_and_made_printable():
    assert plain("a\x00b\u202ec") == "a�b�c"
    assert len(plain("x" * 10_000)) == 60
