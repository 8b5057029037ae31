"""How long a run waits is written down beside its job, for whichever process runs it."""

import pytest

from fedgrade.errors import DocumentRefused, JobRefused
from server.coordinator_folder import CoordinatorFolder, Patience


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "coordinator").mkdir()
    return CoordinatorFolder(root=tmp_path)


def test_patience_is_kept_and_has_a_default(folder):
    assert folder.read_patience() == Patience()
    folder.put_patience(Patience(deadline_seconds=30.0, admission_seconds=3600.0))
    assert folder.read_patience() == Patience(deadline_seconds=30.0, admission_seconds=3600.0)


@pytest.mark.parametrize("values", [{"deadline_seconds": 0.0}, {"deadline_seconds": float("inf")},
                                    {"deadline_seconds": float("nan")}, {"admission_seconds": -1.0}])  # fmt: skip
def test_impossible_patience_is_refused(values):
    with pytest.raises(JobRefused, match="patience"):
        Patience(**values)


def test_a_damaged_file_is_named(folder):
    folder.patience.write_text('{"deadline": 5}')
    with pytest.raises(DocumentRefused, match=r"patience\.json"):
        folder.read_patience()
