"""A coordinator's documents in a real PostgreSQL: what they promise, and what is said where it cannot be opened."""

import shutil
import subprocess
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused
from fedgrade.federation.store import Below, Folder
from server.certificates import certify
from server.database import DatabaseUnavailable
from tests.server.postgres_server import PASSWORD, opened

PART = 4 * 2**20  # bytes in one row


@pytest.fixture(scope="module")
def laws(cluster):
    with opened(cluster.address()) as database:
        yield database


# What documents promise, be they files or rows.

NAME = st.sampled_from(["a", "b/c", "b/d", "b.e", "b0", "b/c2", "é/ü"])
CHANGES = st.lists(st.dictionaries(NAME, st.none() | st.binary(max_size=40), max_size=4), max_size=6)


@pytest.mark.parametrize("kind", ["files", "rows"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES)
def test_documents_hold_what_was_written_last(laws, tmp_path_factory, kind, changes):
    whole = Folder(tmp_path_factory.mktemp("documents")) if kind == "files" else laws
    whole.write(dict.fromkeys(whole.names("")))
    documents, expected = Below(documents=whole, folder="x"), {}
    for change in changes:
        documents.write(change)
        expected |= change
    held = {name: content for name, content in expected.items() if content is not None}
    assert documents.names("") == tuple(sorted(held))
    assert documents.names("b") == tuple(sorted(name for name in held if name.startswith("b/")))
    assert {name: documents.read(name) for name in expected} == expected


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART])
def test_a_document_of_any_size_comes_back_byte_for_byte(laws, size):
    content = bytes(range(256)) * (size // 256 + 1)
    laws.write({"large": content[:size]})
    assert laws.read("large") == content[:size]
    with pytest.raises(DocumentRefused, match=f"large: {size} bytes; the limit is {size - 1}"):
        laws.read("large", limit=size - 1)


def test_a_change_is_made_as_a_whole_or_not_at_all(laws):
    laws.write({"first": b"old"})
    with pytest.raises(DocumentRefused, match="the limit"):
        laws.write({"first": b"new", "n" * 600: b""})
    assert laws.read("first") == b"old"
    assert laws.read("never") is None


@pytest.mark.parametrize(
    "harm",
    [
        "update laws.parts set content = set_byte(content, 3, get_byte(content, 3) # 1) where name = 'kept'",
        "update laws.parts set content = 'short' where name = 'kept'",
        "delete from laws.parts where name = 'kept'",
        "insert into laws.parts values ('kept', 7, 'more')",
        "update laws.documents set digest = sha256('other') where name = 'kept'",
    ],
)
def test_bytes_that_somebody_changed_in_a_table_are_not_believed(laws, cluster, harm):
    laws.write({"kept": b"what was written"})
    cluster.execute(harm)
    with pytest.raises(DocumentRefused, match="schema laws: kept: has changed since it was written"):
        laws.read("kept")


def test_a_schema_of_another_version_is_left_alone(cluster):
    address = cluster.address()
    with opened(address, schema="later"):
        cluster.execute("update later.about set version = 2")
    with (
        pytest.raises(DatabaseUnavailable, match=r"schema later: is of version \(2,\)"),
        opened(address, schema="later"),
    ):
        pass


# What goes wrong when it is opened: one line each, and no password in it.


def refused(address):
    with pytest.raises(DatabaseUnavailable) as caught, opened(address, schema="refused"):
        pass
    text = str(caught.value)
    assert "\n" not in text
    assert "hidden" not in text
    return text


@pytest.fixture
def passwords(tmp_path, monkeypatch):
    """A password file with the given password for everything."""

    def write(password):
        path = tmp_path / "pgpass"
        path.write_text(f"*:*:*:*:{password}\n")
        path.chmod(0o600)
        monkeypatch.setenv("PGPASSFILE", str(path))

    return write


def by_network(cluster, *, user="fed", options="?sslmode=disable"):
    return f"postgresql://{user}@127.0.0.1:{cluster.port}/fed{options}"


def test_a_wrong_password_is_said_in_one_line(cluster, passwords):
    passwords("hidden")
    assert 'password authentication failed for user "fed"' in refused(by_network(cluster))
    passwords(PASSWORD)
    with opened(by_network(cluster), schema="by_network"):
        pass


def test_a_server_without_tls_gets_no_password(cluster, passwords):
    passwords(PASSWORD)
    assert "server does not support SSL" in refused(by_network(cluster, options=""))


def test_a_server_is_believed_by_its_certificate_alone(cluster, passwords, tmp_path):
    passwords(PASSWORD)
    own, other = (certify(tmp_path / name, ["127.0.0.1"], now=datetime.now(UTC)) for name in ("own", "other"))
    for source, name in ((own.certificate, "server.crt"), (own.key, "server.key")):
        shutil.copy(source, cluster.folder / "data" / name)
        shutil.chown(cluster.folder / "data" / name, *cluster.owner)
    try:
        cluster.set("ssl", "on")
        with opened(by_network(cluster, options=f"?sslrootcert={own.authority}"), schema="by_tls") as database:
            database.write({"kept": b"in transit"})
            assert database.read("kept") == b"in transit"
        told = refused(by_network(cluster, options=f"?sslrootcert={other.authority}"))
        assert "certificate verify failed" in told
    finally:
        cluster.set("ssl", "off")


def test_an_unknown_database_and_a_server_that_is_not_there_are_said_in_one_line(cluster, tmp_path):
    assert 'database "nowhere" does not exist' in refused(cluster.address(database="nowhere"))
    assert "No such file" in refused(f"postgresql://fed@/fed?host={tmp_path}")


def test_a_user_that_may_only_read_is_refused_when_it_connects(cluster):
    assert "permission denied for database fed" in refused(cluster.address(user="reader"))
    with opened(cluster.address(), schema="read_only"):
        cluster.execute("grant usage on schema read_only to reader")
        cluster.execute("grant select on all tables in schema read_only to reader")
    reading = opened(cluster.address(user="reader"), schema="read_only")
    with pytest.raises(DatabaseUnavailable, match="permission denied for table about"), reading:
        pass


def test_a_disk_that_is_full_leaves_everything_as_it_was(cluster):
    place = cluster.folder / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    shutil.chown(place, *cluster.owner)
    try:
        cluster.execute(f"create tablespace small location '{place}'", database="postgres")
        with opened(cluster.address(), schema="small") as database:
            cluster.execute("alter table small.parts set tablespace small")
            database.write({"kept": b"before"})
            with pytest.raises(
                DatabaseUnavailable, match=r"schema small: could not extend file .*No space left"
            ) as full:
                database.write({"kept": b"after", "large": bytes(8 * 2**20)})
            assert "\n" not in str(full.value)
            assert database.read("kept") == b"before"
            assert database.names("") == ("kept",)
            database.write({"kept": b"after"})
        cluster.execute("drop schema small cascade")
        cluster.execute("drop tablespace small", database="postgres")
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
