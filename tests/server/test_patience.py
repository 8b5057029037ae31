"""How long a run waits is written down beside its job, for whichever process runs it."""

import pytest

from fedgrade.errors import JobRefused, SignatureRefused
from fedgrade.trust.canonical import encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey
from server.coordinator_folder import CoordinatorFolder, Patience


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "coordinator").mkdir()
    SigningKey.generate().save(tmp_path / "coordinator" / "key.pem")
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


FOREVER = Patience(deadline_seconds=1e9, admission_seconds=1e9)


@pytest.mark.parametrize(
    "raw",
    [encode(FOREVER), seal(FOREVER, SigningKey.generate()), b'{"deadline": 5}', b""],
    ids=["unsigned", "by another key", "damaged", "empty"],
)
def test_patience_that_the_coordinator_did_not_sign_is_refused_until_resume_writes_it_anew(folder, raw):
    folder.patience.write_bytes(raw)
    with pytest.raises(
        SignatureRefused, match=r"patience\.json: was not signed by this coordinator .*`fedgrade resume`"
    ):
        folder.read_patience()
    folder.put_patience(Patience(deadline_seconds=30.0))
    assert folder.read_patience() == Patience(deadline_seconds=30.0)
