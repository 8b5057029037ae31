import warnings

import pytest

with warnings.catch_warnings():
    # flwr pins a typer that still uses names which click deprecates; nobody here can act on it, so it is imported once
    # with these warnings held back, before any test turns warnings into errors.
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401


@pytest.fixture(scope="module")
def cluster():
    """A PostgreSQL server of the module's own."""
    from tests.server import postgres_server  # noqa: PLC0415 - a moment that other tests need not wait

    found = postgres_server.programs()
    if found is None:
        pytest.skip("no PostgreSQL server is installed here (apt-get install postgresql)")
    with postgres_server.postgres_cluster(found) as cluster:
        yield cluster
