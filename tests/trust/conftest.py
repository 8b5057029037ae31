import pytest

from tests.trust.small_ledger import EVERY_KIND, write


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A small ledger, line by line, and the folder of a test's own copies."""
    path = write(tmp_path_factory.mktemp("ledger") / "ledger.jsonl", EVERY_KIND[2:5])
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "ledger.jsonl"
