import pytest

from tests.federation.small_federation import calibrate_once
from tests.report.folders import federations, troubled_folder

__all__ = ["federations", "troubled_folder"]


@pytest.fixture(autouse=True, scope="module")
def _solved_once():
    """Each plan is solved once a session: every report decodes it again, and the answer never changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.job.calibrate", calibrate_once)
        yield
