import pytest

from tests.federation.small_federation import SmallFederation, zeros


@pytest.fixture
def federation(tmp_path):
    return SmallFederation.create(tmp_path / "federation")


@pytest.fixture
def quiet(monkeypatch):
    """Sites add no noise: for tests of everything around it, which then have one exact answer."""
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", zeros)
