"""What every test shares: frozen vectors, rewritten only with ``--update-vectors``, and Hypothesis without a clock."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

VECTORS = Path(__file__).parent / "vectors"

# Machines differ in speed; a law does not.
settings.register_profile("fedgrade", deadline=None)
settings.load_profile("fedgrade")


def pytest_configure(config):
    del config
    # A shell that starts the tests in the background lets them ignore Ctrl-C, and so every process that they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--update-vectors", action="store_true", help="rewrite tests/vectors from what the code does now")


@pytest.fixture
def frozen(request):
    """``frozen(name, found)`` asserts that the bytes ``found`` are those of ``tests/vectors/<name>``."""

    def compare(name, found):
        path = VECTORS / name
        if request.config.getoption("--update-vectors"):
            path.write_bytes(found)
        assert path.read_bytes() == found, f"{name} differs; if the change is meant, it changes a published format"

    return compare
