import shutil
from dataclasses import replace

import pytest

from fedgrade.federation.messages import Admitted
from tests.federation.small_federation import SmallFederation, calibrate_once, quick_noise, told, with_privacy, zeros


@pytest.fixture(autouse=True)
def _solved_once(monkeypatch):
    """Each plan is solved once a session: it is decoded hundreds of times here, and the answer never changes."""
    monkeypatch.setattr("fedgrade.job.calibrate", calibrate_once)


@pytest.fixture
def federation(tmp_path):
    return SmallFederation.create(tmp_path / "federation")


@pytest.fixture
def job(federation):
    return federation.job()


@pytest.fixture
def admitted(federation, job):
    """A site that takes part in ``job``."""
    with federation.site() as site:
        assert isinstance(told(federation, site, federation.admission(job)), Admitted)
        yield site


@pytest.fixture
def quick(monkeypatch):
    """Sites add noise that is as fresh as the real one and not exact: for tests that start many runs."""
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)


@pytest.fixture
def quiet(monkeypatch):
    """Sites add no noise: for tests of everything around it, which then have one exact answer."""
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", zeros)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A federation with one finished job; shared, so tests work on copies or put back what they changed."""
    federation = SmallFederation.create(tmp_path_factory.mktemp("whole") / "federation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
        federation.run_in_process(federation.job(with_privacy(rounds=1)))
    return federation


@pytest.fixture
def copy(whole, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(whole.root, tmp_path / "copy")
    return replace(whole, root=tmp_path / "copy")
