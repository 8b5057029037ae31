"""The files a partner begins with: they say what was asked for, whatever characters that is made of."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients import templates
from clients.settings import SiteSettings
from clients.templates import PolicyValues, SiteValues, policy_yaml, site_yaml
from fedgrade.errors import DocumentRefused, FedgradeError
from fedgrade.federation.policy import Policy
from fedgrade.trust.canonical import decode_yaml

EXAMPLE = Path(templates.__file__).with_name("site.example.yaml")
VALUES = {
    "site": "recycler-a",
    "photos": "photos",
    "lineage": "pumps-north",
    "cohort": "2026-11",
    "manifest": "manifest.csv",
    "declared_items": 400,
    "photos_per_item": 10,
}
POLICY = {
    "modes": ("local",),
    "epsilon_limit": 8,
    "epsilon_per_job": 4.0,
    "backbones": ("tf_efficientnet_lite0",),
    "grades": ("intact", "defective"),
}

texts = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=40)


@given(texts, texts, texts)
def test_a_site_file_says_what_was_asked_for(photos, lineage, cohort):
    text = site_yaml(SiteValues(**{**VALUES, "photos": photos, "lineage": lineage, "cohort": cohort}))
    settings = decode_yaml(SiteSettings, text.encode())
    assert (settings.photos, settings.lineage, list(settings.cohorts)) == (photos, lineage, [cohort])


@given(st.lists(texts, min_size=2, max_size=6))
def test_a_policy_says_what_was_asked_for(grades):
    text = policy_yaml(PolicyValues(**{**POLICY, "grades": tuple(grades)}))
    assert decode_yaml(Policy, text.encode()).grades == tuple(grades)


@pytest.mark.parametrize("photos", ["a\nsite: b", "a\x1b[2J", "a\u2028b", ""])
def test_what_is_no_line_of_text_reaches_no_file(photos):
    if photos:
        with pytest.raises(DocumentRefused, match="printable"):
            site_yaml(SiteValues(**{**VALUES, "photos": photos}))
    else:
        assert 'photos: ""' in site_yaml(SiteValues(**{**VALUES, "photos": photos}))


@pytest.mark.parametrize(("name", "value"), [("site", "../a"), ("declared_items", 0), ("photos_per_item", 0)])
def test_what_no_site_could_have_is_refused_before_it_is_written(name, value):
    with pytest.raises(FedgradeError):
        site_yaml(SiteValues(**{**VALUES, name: value}))


def test_the_example_in_the_package_is_what_a_partner_gets():
    assert EXAMPLE.read_text() == site_yaml(SiteValues(**VALUES, address="coordinator.example:8443"))
