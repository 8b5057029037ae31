"""The report says what ran, and what partners found to be wrong afterwards."""

from datetime import UTC, datetime
from fractions import Fraction
from html import unescape

from fedgrade.federation.verification import verify_federation
from fedgrade.report import privacy_report
from fedgrade.report.words import grouped
from fedgrade.trust.records import AccountKey
from fedgrade.trust.software import running_software

NOW = datetime(2026, 3, 3, 12, 0, tzinfo=UTC)


def words(folder):
    return unescape(privacy_report(verify_federation(folder), generated=NOW))


def test_the_source_and_every_library_that_ran_are_named_in_full(troubled_folder):
    page, software = words(troubled_folder), running_software()
    assert grouped(software.source) in page
    for name, version in software.libraries.items():
        assert f"{name} {version}" in page
    assert "Corrected." not in page


def test_a_correction_is_in_the_figures_and_told_with_its_reason(federations, tmp_path):
    workshop = federations.Workshop(folder=tmp_path / "federation")
    try:
        federations.play(federations.Story(), workshop)
        site, dataset = next(iter(workshop.datasets.items()))
        account = AccountKey(partner=site, lineage=dataset.lineage, cohort=dataset.cohort, partition="test")
        workshop.charging[site].correct(account, rho=Fraction(1, 800), reason="<b>the clip</b> was off")
    finally:
        workshop.close()
    page = privacy_report(verify_federation(tmp_path / "federation"), generated=NOW)
    assert "Corrected." in page
    assert f"{site}, {dataset.lineage} / {dataset.cohort}, held-out items" in page
    assert "&lt;b&gt;the clip&lt;/b&gt; was off" in page
