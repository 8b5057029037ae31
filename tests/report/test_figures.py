import re
from xml.etree import ElementTree as ET

import pytest

from fedgrade.report.figures import MAX_BARS, BudgetBar, SpendingLine, budget_bars, spending_lines


def bar(label="turin", used=3.0, ceiling=8.0, *, training=True):
    return BudgetBar(label=label, training=training, used=used, ceiling=ceiling)


def line(label="turin", epsilons=(1.0, 2.0), ceiling=8.0):
    return SpendingLine(label=label, epsilons=epsilons, ceilings=(ceiling,) * len(epsilons))


def both(drawing):
    return (drawing.wide, drawing.narrow)


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314 - ours


def test_the_same_numbers_draw_the_same_bytes():
    assert budget_bars([bar()], description="x") == budget_bars([bar()], description="x")
    assert spending_lines([line()], description="x") == spending_lines([line()], description="x")


def test_plots_in_one_page_share_no_identifier():
    drawings = [*both(budget_bars([bar()], description="x")), *both(spending_lines([line()], description="x"))]
    names = [name for svg in drawings for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(set(names)) == len(names)
    for svg in drawings:
        used = set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")\s]+)', svg))
        assert used <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_a_plot_fetches_nothing():
    for svg in (*both(budget_bars([bar()], description="x")), *both(spending_lines([line()], description="x"))):
        assert not re.search(r'(?:href|src)="(?!#)', svg)
        assert "<script" not in svg
        assert "<image" not in svg
        assert "<!DOCTYPE" not in svg


def test_a_plot_says_in_words_what_it_shows():
    (svg, _) = both(budget_bars([bar()], description='turin: 3.00 of 8.00 <"&'))
    root = ET.fromstring(svg)  # noqa: S314 - our own drawing
    assert root.attrib["role"] == "img"
    assert root[0].text == "Epsilon used against each account's lifetime ceiling"
    assert root[1].text == 'turin: 3.00 of 8.00 <"&'


@pytest.mark.parametrize("name", ["$x^2$", "$", r"\frac{", "<script>alert(1)</script>", "回收站", "a&b", "%s{}", "]]>"])
def test_a_name_is_drawn_as_it_is_written(name):
    for svg in (
        *both(budget_bars([bar(name)], description=name)),
        *both(spending_lines([line(name)], description=name)),
    ):
        assert any(text and name in text for text in texts(svg))
        assert "<script" not in svg


def test_accounts_that_moved_alike_share_one_line_that_names_them():
    drawing = spending_lines([line("gdansk"), line("turin"), line("bremen", (1.0, 1.5))], description="x")
    assert "gdansk, turin 2.00" in texts(drawing.wide)
    assert "bremen 1.50" in texts(drawing.wide)


def test_a_common_fate_is_said_in_short():
    drawing = spending_lines([line(f"site-{index}") for index in range(300)], description="x")
    assert "all 300 sites 2.00" in texts(drawing.wide)


def test_many_lines_and_bars_are_drawn_without_a_label_each():
    lines = [line(f"site-{index}", (1.0, 1.0 + index / 100)) for index in range(40)]
    assert len(spending_lines(lines, description="x").wide) < 200_000
    bars = [bar(f"site-{index}") for index in range(1000)]
    assert (
        len([text for text in texts(budget_bars(bars, description="x").wide) if text.startswith("site-")]) == MAX_BARS
    )


def test_a_ceiling_that_was_moved_is_drawn_as_a_step():
    moved = SpendingLine(label="turin", epsilons=(1.0, 2.0, 3.0), ceilings=(4.0, 4.0, 8.0))
    assert "lifetime ceiling 8.00" in texts(spending_lines([moved], description="x").wide)


def test_a_single_charge_is_enough_for_a_plot():
    assert "turin 1.00" in texts(spending_lines([line(epsilons=(1.0,))], description="x").wide)
