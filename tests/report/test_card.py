"""The model card: made from what was proved, the same each time, and honest about what is not known."""

from dataclasses import replace

import pytest

from fedgrade.errors import DocumentRefused
from fedgrade.federation.bundle import BundledFile
from fedgrade.federation.registry import registry
from fedgrade.federation.verification import verify_federation
from fedgrade.grading import GradeScale
from fedgrade.privacy.plan import LocalSgdSpec
from fedgrade.report.card import Publication, model_card

FILES = {"model.onnx": BundledFile.of(b"model"), "release.json": BundledFile.of(b"release")}
FIRST = Publication(earlier=(), difference=3e-8, licence="", files=FILES)


@pytest.fixture(scope="module")
def card_of(federations, tmp_path_factory):
    """The card of the only job of a story, and what was proved of it."""

    def make(publication=FIRST, *, without=(), composition="zcdp", **story):
        folder = tmp_path_factory.mktemp("card") / "federation"
        told = federations.Story(**story)
        federations.write_federation(folder, told, sites=told.sites, composition=composition)
        for site in without:
            (folder / "sites" / site / "ledger.jsonl").unlink()
        proof = verify_federation(folder)
        (job,) = proof.jobs.values()
        return model_card(job, proof, publication), job, folder

    return make


@pytest.fixture(scope="module")
def plain(card_of):
    return card_of()


def test_the_same_release_has_the_same_card(plain):
    page, job, folder = plain
    assert model_card(job, verify_federation(folder), FIRST) == page
    assert model_card(job, verify_federation(folder), replace(FIRST, difference=2e-8)) == page


def test_what_nobody_said_is_said_to_be_missing(plain):
    page, _, _ = plain
    assert "The coordinator states no" in page
    assert "first release for this asset type." in page
    assert "Not in these figures" not in page
    assert "No training item may be synthetic" in page
    assert "the same for every partner" in page


def test_partners_whose_ledger_is_not_there_are_named(card_of):
    page, _, _ = card_of(without=("gdansk", "turin"))
    assert "<strong>Not in these figures:</strong> gdansk, turin." in " ".join(page.split())


def test_a_site_that_was_silent_answered_fewer_stages(card_of):
    page, job, _ = card_of(silent=frozenset({("limerick", 7)}))
    stages = len(job.rounds)
    assert f"{stages - 1} of {stages}" in page
    assert "the same for every partner" not in page


def test_floating_point_noise_is_not_hidden(card_of):
    spec = LocalSgdSpec(
        target_epsilon=3.0, delta=1e-5, evaluation_epsilon=1.0, centre_share=0.1, rounds=4, max_grad_norm=1.0,
        sampling_rate=0.05, local_steps=8, learning_rate=0.5,
    )  # fmt: skip
    # As many items each: one plan, which takes seconds to solve, does for both.
    page, _, _ = card_of(privacy=spec, composition="mixed", sites=("bremen", "gdansk"))
    assert "Its noise is floating-point" in page


def test_a_scale_without_critical_grades_has_no_figure_for_them(card_of):
    scale = GradeScale(name="mild", labels=("fine", "poor"), critical=(), cost=((0, 1), (1, 0)))
    page, _, _ = card_of(scale=scale)
    assert 'data-figure="miss"' not in page
    assert 'data-figure="accuracy"' in page


def test_labels_that_look_like_a_page_stay_text(card_of):
    scale = GradeScale(
        name="odd", labels=("<img src=x>", "\x1b[31mred"), critical=("<img src=x>",), cost=((0, 1), (1, 0))
    )
    page, _, _ = card_of(scale=scale)
    assert "<img" not in page
    assert "\x1b" not in page


def test_earlier_releases_are_listed(plain):
    _, job, folder = plain
    proof = verify_federation(folder)
    releases = registry(folder, coordinator=proof.roster.coordinator)
    page = model_card(job, proof, replace(FIRST, earlier=releases))
    assert "newest first" in page
    assert f"{releases[0].metrics.quadratic_weighted_kappa:.3f}" in page


def test_a_job_without_a_release_has_no_card(federations, tmp_path):
    federations.write_federation(tmp_path / "federation", federations.Story(published=False))
    proof = verify_federation(tmp_path / "federation")
    (job,) = proof.jobs.values()
    with pytest.raises(DocumentRefused, match="no release that anyone evaluated"):
        model_card(job, proof, FIRST)


@pytest.mark.parametrize("licence", ["a\nb", "\x1b[0m", "x" * 201])
def test_a_licence_is_one_short_line(licence):
    with pytest.raises(DocumentRefused, match="at most 200 printable characters"):
        replace(FIRST, licence=licence)
