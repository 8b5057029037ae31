"""How long a run waits is written down beside its job, for whichever process runs it."""

import pytest
from click.testing import CliRunner

from fedgrade.errors import JobRefused, SignatureRefused
from fedgrade.trust.canonical import encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey
from server import commands
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


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ((), Patience(deadline_seconds=30.0, admission_seconds=3600.0)),
        (("--deadline", "5"), Patience(deadline_seconds=5.0, admission_seconds=3600.0)),
        (("--wait", "0"), Patience(deadline_seconds=30.0, admission_seconds=0.0)),
    ],
)
def test_a_job_that_goes_on_keeps_the_patience_that_is_not_given_anew(folder, monkeypatch, typed, kept):
    """Whoever only follows a run must not change how long it waits if it is taken up again later."""
    folder.put_patience(Patience(deadline_seconds=30.0, admission_seconds=3600.0))
    monkeypatch.setattr(commands, "_run_here", lambda *_: None)
    monkeypatch.setattr(CoordinatorFolder, "read_job", lambda _self: None)
    shown = CliRunner().invoke(commands.resume, [str(folder.root), *typed])
    assert shown.exit_code == 0, shown.output
    assert folder.read_patience() == kept


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
def test_patience_that_the_coordinator_did_not_sign_is_refused_until_resume_writes_it_anew(folder, monkeypatch, raw):
    folder.patience.write_bytes(raw)
    with pytest.raises(
        SignatureRefused, match=r"patience\.json: was not signed by this coordinator .*`fedgrade resume`"
    ):
        folder.read_patience()
    monkeypatch.setattr(commands, "_run_here", lambda *_: None)
    monkeypatch.setattr(CoordinatorFolder, "read_job", lambda _self: None)
    assert CliRunner().invoke(commands.resume, [str(folder.root), "--deadline", "30"]).exit_code == 0
    assert folder.read_patience() == Patience(deadline_seconds=30.0)
    folder.patience.write_bytes(raw)
    assert CliRunner().invoke(commands.resume, [str(folder.root)]).exit_code == 0
    assert folder.read_patience() == Patience()
