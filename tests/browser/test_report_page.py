"""The privacy report as a reader's browser shows it: desk and telephone, light and dark."""

import shutil
from datetime import UTC, datetime

import pytest

from fedgrade.federation.verification import verify_federation
from fedgrade.privacy.accounting import printed
from fedgrade.report import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(troubled_folder, tmp_path_factory):
    return shutil.copytree(troubled_folder, tmp_path_factory.mktemp("browser") / "federation")


@pytest.fixture(scope="module")
def path(folder):
    return write_report(folder, roster=None, now=datetime(2026, 3, 3, tzinfo=UTC))


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")], ids=str)
def visit(request, browser, path):
    """The open page, what it complained of, and what it asked the network for."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda one: requests.append(one.url))
    page.goto(path.as_uri())
    yield page, complaints, requests
    page.close()


def test_the_page_is_quiet_and_asks_nobody_for_anything(visit, path):
    _, complaints, requests = visit
    assert complaints == []
    assert requests == [path.as_uri()]


def test_nothing_sticks_out_at_the_side(visit):
    page, _, _ = visit
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_each_plot_is_shown_once_and_has_a_size(visit):
    page, _, _ = visit
    boxes = [plot.bounding_box() for plot in page.query_selector_all("svg.plot") if plot.is_visible()]
    assert len(boxes) == 2
    assert all(box["width"] > 300 and box["height"] > 100 for box in boxes)


def test_letters_in_plots_are_large_enough_to_read(visit):
    page, _, _ = visit
    heights = page.evaluate(
        "[...document.querySelectorAll('svg.plot text')].map(text => text.getBoundingClientRect().height)"
        ".filter(height => height > 0)"
    )
    assert heights
    assert min(heights) >= 10


def test_the_page_is_readable_against_its_paper(visit):
    page, _, _ = visit
    ratios = page.evaluate(
        """() => {
          const light = colour => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
              .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const paper = light(getComputedStyle(document.documentElement).backgroundColor);
          return ['h1', 'p', '.note', '.aside', 'figcaption', 'thead th', 'td', 'code'].map(selector => {
            const ink = light(getComputedStyle(document.querySelector(selector)).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
          });
        }"""
    )
    assert min(ratios) >= 4.5


def test_headline_numbers_are_the_proofs_own(visit, folder):
    page, _, _ = visit
    proof = verify_federation(folder)
    (job,) = proof.jobs.values()
    accounts = [account for site in proof.sites.values() for account in site.accounts.values()]
    worst = printed(max(account.epsilon for account in accounts))
    assert page.inner_text("[data-figure=epsilon]") == f"ε ≤ {worst}"
    holder = printed(max(epsilons.model_holder for epsilons in job.observers.values()))
    assert page.inner_text("[data-figure=holder]") == f"ε ≤ {holder}"
    assert page.inner_text("[data-observer=model_holder]") == holder
    kappa = job.release.release.metrics.quadratic_weighted_kappa
    assert page.inner_text("[data-metric=kappa]") == f"{kappa:.3f}"


def test_it_prints_on_a_few_sheets_of_a4(browser, path):
    page = browser.new_page()
    page.goto(path.as_uri())
    sheets = page.pdf(format="A4", prefer_css_page_size=True).count(b"/Type /Page\n")
    page.close()
    assert 4 <= sheets <= 9
