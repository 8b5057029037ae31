"""Files that a coordinator keeps: old or new, never half; what a disk does that takes no more."""

import resource
from contextlib import contextmanager

import pytest

from fedgrade.errors import DocumentRefused, StoreUnavailable
from fedgrade.federation.store import Folder


@contextmanager
def no_file_over(limit):
    """No file of this process can grow over ``limit`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_kept_and_no_piece_of_the_rest(tmp_path):
    folder = Folder(tmp_path)
    folder.write({"jobs/a": b"old", "jobs/b": b"old"})
    with no_file_over(4096), pytest.raises(StoreUnavailable, match=r"jobs/b: cannot be written \(File too large\)"):
        folder.write({"jobs/a": b"new", "jobs/b": bytes(5000), "jobs/c": b"new"})
    assert {name: folder.read(name) for name in folder.names("")} == {"jobs/a": b"new", "jobs/b": b"old"}
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == ["a", "b"]


def test_a_place_that_cannot_hold_files_is_named(tmp_path):
    (tmp_path / "jobs").write_bytes(b"a file where a folder should be")
    with pytest.raises(StoreUnavailable, match="jobs/a: cannot be written"):
        Folder(tmp_path).write({"jobs/a": b"new"})


def test_a_file_that_is_too_large_or_none_is_refused(tmp_path):
    folder = Folder(tmp_path)
    folder.write({"large": bytes(10)})
    assert folder.read("large", limit=10) == bytes(10)
    with pytest.raises(DocumentRefused, match="large: over 9 bytes"):
        folder.read("large", limit=9)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DocumentRefused, match="folder: cannot be read"):
        folder.read("folder")


def test_what_an_interrupted_write_left_is_no_document(tmp_path):
    (tmp_path / "weights.part").write_bytes(b"half")
    assert Folder(tmp_path).names("") == ()
