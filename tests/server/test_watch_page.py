"""What `fedgrade watch` shows: sites by stages on a terminal, small and large."""

from dataclasses import replace
from datetime import timedelta

import pytest
from rich.console import Console

from server.watch_page import page, seconds_left
from tests.server.run_view import NOW, big


def shown(view, *, width=80, height=40, now=NOW):
    console = Console(width=width, height=height, color_system=None, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(page(view, width=width, height=height, now=now))
    return captured.get().rstrip("\n").splitlines()


def test_twenty_sites_and_sixty_rounds_fit_a_terminal_of_80_columns():
    lines = shown(big())
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split()[1] for line in lines if line.startswith("site-") and len(line.split()) == 2}
    assert len(rows) == 20
    assert {len(cells) for cells in rows.values()} == {62}
    assert rows["site-00"] == "■" * 23 + "·" * 39
    assert rows["site-02"] == "■" * 23 + "?" + "·" * 38
    assert rows["site-04"] == "x" + "-" * 22 + "·" * 39
    assert rows["site-07"] == "■" * 19 + "ozzz" + "·" * 39
    text = "\n".join(lines)
    assert "23 of 62 stages done, now training round 23 of 60" in text
    assert "0:13:00 ago; about 0:19:" in text
    assert "Waiting for site-02: asked 0:01:20 ago" in text
    assert "site-07 missing since stage 20" in text
    assert "site-04 missing since stage 1" in text
    # Names and refusals are other people's.
    assert "\x1b" not in text
    assert "\x07" not in text


@pytest.mark.parametrize(("sites", "height"), [(20, 24), (60, 24), (200, 40), (20, 10)])
def test_where_lines_are_few_those_that_miss_something_are_shown(sites, height):
    lines = shown(big(sites=sites), height=height)
    assert len(lines) <= max(height, 16)
    assert any(line.startswith("site-07  ") for line in lines)
    assert any("more sites, which have answered every stage so far" in line for line in lines)


def test_where_columns_are_few_a_cell_is_the_worst_of_several_stages():
    lines = shown(big(rounds=500))
    (row,) = [line.split()[1] for line in lines if line.startswith("site-07  ")]
    assert len(row) <= 80
    assert row.startswith("■■o·")
    assert "A column is 8 stages" in "\n".join(lines)


def test_what_is_left_is_foretold_from_the_last_stages():
    view = big()
    assert seconds_left(view, now=NOW) == pytest.approx(30 * 39 - 30)
    assert seconds_left(replace(view, progress=view.progress[:1]), now=NOW) is None
    assert seconds_left(replace(view, run=replace(view.run, state="failed")), now=NOW) is None


def test_nothing_is_foretold_of_a_run_that_stands_still():
    view = big()
    assert seconds_left(view, now=NOW + timedelta(seconds=59)) == pytest.approx(30 * 38)
    assert seconds_left(view, now=NOW + timedelta(seconds=61)) is None
    assert not any("left" in line for line in shown(view, now=NOW + timedelta(seconds=61)))
