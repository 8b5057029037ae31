import shutil
from pathlib import Path

import pytest

import fedgrade
from fedgrade.errors import DocumentRefused, LedgerUnavailable
from fedgrade.trust.records import Software
from fedgrade.trust.software import running_software, source_digest

HERE = Path(fedgrade.__file__).parent


def test_a_copy_of_the_source_has_the_same_digest_wherever_it_lies(tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert source_digest({"fedgrade": copy}) == source_digest({"fedgrade": HERE})


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "one.py").write_text("x = 2\n"),
        lambda root: (root / "one.py").rename(root / "two.py"),
        lambda root: (root / "three.py").write_text(""),
        lambda root: (root / "one.py").unlink(),
    ],
)
def test_any_change_of_the_source_changes_the_digest(tmp_path, change):
    (tmp_path / "one.py").write_text("x = 1\n")
    before = source_digest({"package": tmp_path})
    assert before != source_digest({"other": tmp_path})
    change(tmp_path)
    assert source_digest({"package": tmp_path}) != before


def test_the_border_between_a_name_and_its_text_cannot_be_moved(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "m.py").write_text("xn.pyy")
    (tmp_path / "b" / "m.py").write_text("x")
    (tmp_path / "b" / "n.py").write_text("y")
    assert source_digest({"p": tmp_path / "a"}) != source_digest({"p": tmp_path / "b"})


def test_what_runs_here_names_the_libraries_that_privacy_rests_on():
    software = running_software()
    assert software.fedgrade == fedgrade.__version__
    assert {"dp-accounting", "numpy", "scipy"} <= set(software.libraries)


def test_source_that_cannot_be_read_is_an_error_and_no_digest(tmp_path):
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LedgerUnavailable, match="source of package: cannot be read"):
        source_digest({"package": tmp_path})


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "x"},
        {"fedgrade": "v" * 81},
        {"libraries": {"n" * 81: "1"}},
        {"libraries": dict.fromkeys(map(str, range(40)), "1")},
    ],
)
def test_a_ledger_from_elsewhere_cannot_say_more_than_that(changes):
    with pytest.raises(DocumentRefused, match="SHA-256 in hexadecimal"):
        Software(**{"fedgrade": "0.1.0", "source": "0" * 64, "libraries": {}, **changes})
