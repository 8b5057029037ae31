import stat

import pytest

from fedgrade.errors import DocumentRefused
from server.private_files import create_private, ensure_token, read_private


def test_a_secret_is_readable_by_its_owner_alone(tmp_path):
    create_private(tmp_path / "deep" / "secret", b"content")
    assert stat.S_IMODE((tmp_path / "deep" / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "deep").stat().st_mode) == 0o700
    assert read_private(tmp_path / "deep" / "secret") == b"content"


def test_a_secret_is_never_overwritten(tmp_path):
    create_private(tmp_path / "secret", b"first")
    with pytest.raises(DocumentRefused, match="move it away"):
        create_private(tmp_path / "secret", b"second")
    assert read_private(tmp_path / "secret") == b"first"


def test_a_secret_that_others_may_read_is_refused(tmp_path):
    create_private(tmp_path / "secret", b"content")
    (tmp_path / "secret").chmod(0o604)
    with pytest.raises(DocumentRefused, match="chmod 600"):
        read_private(tmp_path / "secret")


@pytest.mark.parametrize("content", [b"", b"x" * 65_537])
def test_an_empty_or_huge_secret_is_refused(tmp_path, content):
    create_private(tmp_path / "secret", content)
    with pytest.raises(DocumentRefused, match="1 to 65536 bytes"):
        read_private(tmp_path / "secret")


def test_a_missing_secret_is_one_clear_error(tmp_path):
    with pytest.raises(DocumentRefused, match="No such file"):
        read_private(tmp_path / "secret")


def test_a_token_is_kept_once_made(tmp_path):
    first = ensure_token(tmp_path / "token").read_bytes()
    assert ensure_token(tmp_path / "token").read_bytes() == first
    assert len(first) >= 43
