import warnings

import pytest

from tests.federation.small_federation import SmallFederation, calibrate_once, quick_noise, zeros
from tests.server.few_photos import shared_backbones

with warnings.catch_warnings():
    # flwr pins a typer that still uses names which click deprecates; nobody here can act on it, so it is imported once
    # with these warnings held back, before any test turns warnings into errors.
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    import flwr.app  # noqa: F401


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


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Where the exported backbone is kept: once a session, for it takes seconds."""
    return shared_backbones(tmp_path_factory)
