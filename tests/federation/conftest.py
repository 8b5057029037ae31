import shutil
from dataclasses import replace

import pytest

from fedgrade.federation.messages import Admitted
from tests.federation.lying_coordinator import RECOVERING, Coordinator
from tests.federation.small_federation import SmallFederation, calibrate_once, quick_noise, told, with_privacy, zeros
from tests.federation.sum_partners import FIVE, Noted, Partners


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


@pytest.fixture
def partners(tmp_path):
    with Partners.of(SmallFederation.create(tmp_path / "five", names=FIVE)) as partners:
        yield partners


@pytest.fixture
def coordinator(partners, monkeypatch):
    """Of an all-or-nothing job; whatever is asked, no site's plain vector is in any byte that left."""
    coordinator = Coordinator(partners)
    noted = Noted(monkeypatch, coordinator)
    yield coordinator
    assert not any(plain.tobytes() in raw for plain in noted.plain.values() for raw in coordinator.heard)


@pytest.fixture
def recovering(partners, monkeypatch):
    """The same of a job whose sums tolerate one dropout."""
    coordinator = Coordinator(partners, RECOVERING)
    noted = Noted(monkeypatch, coordinator)
    yield coordinator
    assert not any(plain.tobytes() in raw for plain in noted.plain.values() for raw in coordinator.heard)
