"""How the report spells numbers. Losses are rounded up, noise is rounded down; nothing is made to look better."""

import math
from fractions import Fraction

from fedgrade.privacy.accounting import printed

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_RHO, _TIMES = "\N{GREEK SMALL LETTER RHO}", "\N{MULTIPLICATION SIGN}"
_MAX_TEXT = 60  # characters of a name that someone else chose


def epsilon_text(epsilon: float) -> str:
    """``epsilon`` with two decimals, rounded up."""
    return printed(epsilon)


def delta_text(delta: Fraction) -> str:
    """``delta`` as ``10⁻⁵`` or ``2.5`` times ``10⁻⁶``, rounded up to three digits."""
    exponent = math.floor(math.log10(delta))
    mantissa = math.ceil(delta / Fraction(10) ** exponent * 100) / 100
    power = f"10{str(exponent).translate(SUPERSCRIPTS)}"
    return power if mantissa == 1 else f"{mantissa:g} {_TIMES} {power}"


def share_text(share: float) -> str:
    """A rate as a percentage with one decimal, rounded up."""
    return f"{math.ceil(share * 1000 - 1e-9) / 10:.1f} %"


def area_text(area: float) -> str:
    """An area under a curve with two decimals, rounded up."""
    return f"{math.ceil(area * 100 - 1e-9) / 100:.2f}"


def noise_text(multiplier: Fraction) -> str:
    """A noise level with three decimals, rounded down."""
    return f"{math.floor(multiplier * 1000) / 1000:,.3f}"


def rho_text(rho: Fraction) -> str:
    """A cost in zero-concentrated differential privacy with four significant digits, rounded up."""
    if rho == 0:
        return f"{_RHO} = 0"
    step = Fraction(10) ** (math.floor(math.log10(rho)) - 3)
    return f"{_RHO} = {float(math.ceil(rho / step) * step):.4g}"


def limit_text(limit: Fraction) -> str:
    """A ceiling as the partner wrote it, with at least two decimals."""
    text = f"{float(limit):.6f}".rstrip("0")
    whole, _, decimals = text.partition(".")
    return f"{whole}.{decimals:0<2}"


def count_text(count: float) -> str:
    """A noised count as a whole number with a true minus sign."""
    whole = round(count)
    return f"\N{MINUS SIGN}{-whole:,}" if whole < 0 else f"{whole:,}"


def plain(text: str) -> str:
    """A name that someone else chose, cut short and without characters that do not print."""
    shown = "".join(character if character.isprintable() else "�" for character in text)
    return shown if len(shown) <= _MAX_TEXT else shown[: _MAX_TEXT - 1] + "…"


def grouped(hexadecimal: str) -> str:
    """A digest in blocks of four, to be read out over the telephone."""
    return " ".join(hexadecimal[start : start + 4] for start in range(0, len(hexadecimal), 4))


def counted(number: int, noun: str) -> str:
    """``1 site``, ``5 sites``, ``1,020 entries``."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun if number == 1 else plural}"


def typeset(text: str) -> str:
    """Our own words with the apostrophes of print."""
    return text.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")
