import pytest

from tests.federation.small_federation import SmallFederation, calibrate_once, quick_noise, zeros


@pytest.fixture(autouse=True)
def _solved_once(monkeypatch):
    """Each plan is solved once a session: it is decoded hundreds of times here, and the answer never changes."""
    monkeypatch.setattr("fedgrade.job.calibrate", calibrate_once)


@pytest.fixture
def federation(tmp_path):
    return SmallFederation.create(tmp_path / "federation")


@pytest.fixture
def quick(monkeypatch):
    """Sites add noise that is as fresh as the real one and not exact: for tests that start many runs."""
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)


@pytest.fixture
def quiet(monkeypatch):
    """Sites add no noise: for tests of everything around it, which then have one exact answer."""
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", zeros)
