"""The model card as its reader's browser shows it: desk and telephone, light and dark."""

import pytest

from fedgrade.federation.bundle import BundledFile
from fedgrade.federation.registry import lineage, registry
from fedgrade.federation.verification import verify_federation
from fedgrade.privacy.accounting import printed
from fedgrade.report.card import Publication, model_card

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def job(federations, tmp_path_factory):
    """The second of two jobs, with its federation's proof and the registry."""
    folder = tmp_path_factory.mktemp("card") / "federation"
    stories = (federations.Story(name="cells-pilot"), federations.Story(name="cells-winter"))
    workshop = federations.write_federation(folder, *stories, epsilon_limits=dict.fromkeys(federations.SITES, 20.0))
    proof = verify_federation(folder)
    releases = registry(folder, coordinator=workshop.roster.coordinator)
    return proof.jobs[releases[-1].job], proof, releases


@pytest.fixture(scope="module")
def path(job, tmp_path_factory):
    proved, proof, releases = job
    publication = Publication(
        earlier=lineage(releases, releases[-1]),
        difference=3e-8,
        licence="for members of the federation",
        files={name: BundledFile.of(name.encode()) for name in ("model.onnx", "release.json", "receipts/a.jsonl")},
    )
    card = tmp_path_factory.mktemp("card") / "card.html"
    card.write_text(model_card(proved, proof, publication), encoding="utf-8")
    return card


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


def test_the_page_is_quiet_runs_nothing_and_asks_nobody_for_anything(visit, path):
    page, complaints, requests = visit
    assert complaints == []
    assert requests == [path.as_uri()]
    assert page.query_selector_all("script, iframe, img, form, link") == []


def test_nothing_sticks_out_at_the_side(visit):
    page, _, _ = visit
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_tables_about_grades_and_partners_fit_without_scrolling(visit):
    page, _, _ = visit
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll:has(.compact, .confusion)')]"
        ".every(box => box.scrollWidth <= box.clientWidth + 1)"
    )


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
          return ['h1', 'p', 'li', '.note', '.aside', 'caption', 'thead th', 'td', 'code'].map(selector => {
            const ink = light(getComputedStyle(document.querySelector(selector)).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
          });
        }"""
    )
    assert min(ratios) >= 4.5


def test_what_it_must_not_be_used_for_comes_before_how_good_it_is(visit):
    page, _, _ = visit
    headings = [heading.inner_text() for heading in page.query_selector_all("h2")]
    assert "what not" in headings[0]
    assert len(headings) == 8


def test_headline_numbers_are_the_releases_own(visit, job):
    page, _, _ = visit
    proved, _, releases = job
    found = proved.release.release.metrics
    assert page.inner_text("[data-figure=kappa]") == f"{found.quadratic_weighted_kappa:.3f}"
    assert page.inner_text("[data-figure=miss]") == f"{100 * found.critical_miss_rate:.1f} %"
    holder = printed(max(epsilons.model_holder for epsilons in proved.observers.values()))
    assert page.inner_text("[data-figure=holder]") == f"ε ≤ {holder}"
    assert "cells-pilot" in page.inner_text("#lineage")
    assert releases[0].digest[:4] in page.inner_text("#lineage")


def test_sampling_is_in_the_uncertainty_at_the_top(visit):
    page, _, _ = visit
    top = float(page.inner_text(".figures div:has([data-figure=miss]) .note").split()[1])
    noise = float(page.inner_text(".metrics div:has([data-metric=miss]) .note").split()[1])
    assert top > noise


def test_it_prints_on_a_few_sheets_of_a4(browser, path):
    page = browser.new_page()
    page.goto(path.as_uri())
    sheets = page.pdf(format="A4", prefer_css_page_size=True).count(b"/Type /Page\n")
    page.close()
    assert 2 <= sheets <= 5
