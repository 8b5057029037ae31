"""One writer a file; and whoever only looks whether there is one keeps no writer out."""

import fcntl
import threading

import pytest

from fedgrade.trust.file_lock import is_held, lock_alone


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger"
    path.write_bytes(b"")
    return path


def test_the_second_is_refused_until_the_first_is_gone(path):
    with path.open("rb") as first:
        assert not is_held(path)
        assert lock_alone(first)
        assert is_held(path)
        with path.open("rb") as second:
            assert not lock_alone(second)
    assert not is_held(path)
    with path.open("rb") as second:
        assert lock_alone(second)


def test_whoever_looks_for_a_moment_keeps_no_writer_out(path):
    with path.open("rb") as looking, path.open("rb") as writing:
        fcntl.flock(looking, fcntl.LOCK_SH)
        with pytest.raises(BlockingIOError):
            fcntl.flock(writing, fcntl.LOCK_EX | fcntl.LOCK_NB)
        threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        assert lock_alone(writing)


def test_writers_come_and_go_while_others_look_all_the_time(path):
    over = threading.Event()

    def look():
        while not over.is_set():
            is_held(path)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(100):
            with path.open("rb") as writing:
                assert lock_alone(writing)
    finally:
        over.set()
        for looker in lookers:
            looker.join()


def test_what_is_not_there_is_held_by_nobody(path):
    assert not is_held(path.with_name("other"))
