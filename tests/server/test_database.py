"""A coordinator's documents in a real PostgreSQL: the same job to the last bit; kills, thieves, typing errors."""

import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused, FedgradeError, LedgerBroken
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.store import Below, Folder
from fedgrade.federation.verification import verify_federation
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey
from server import database as database_module
from server.certificates import certify
from server.coordinate import run_folder
from server.coordinator_file import CoordinatorSettings, read_settings, settings_yaml
from server.coordinator_folder import BOOK, CoordinatorFolder
from server.database import Database, DatabaseUnavailable, UsedElsewhere
from server.enrolment import bring_up_to_date, create_coordinator, enrol, read_book, revoke
from server.hold import Hold
from server.mirror import EVERYTHING
from tests.federation.small_federation import (
    NAMES,
    POLICY,
    SmallFederation,
    calibrate_once,
    quick_noise,
    with_privacy,
    zeros,
)
from tests.federation.sum_partners import SUMS, summing
from tests.server.postgres_server import PASSWORD, postgres_cluster, programs
from tests.server.test_enrolment import request as join_request

SPEC = with_privacy(rounds=1)  # centre, one round, evaluation
STAGES = 3
PART = 4 * 2**20  # bytes in one row
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SETTINGS = CoordinatorSettings(
    host="coordinator.example",
    public_port=8443,
    admin_port=8444,
    interface="0.0.0.0",  # noqa: S104
)


@pytest.fixture(scope="module")
def cluster():
    found = programs()
    if found is None:
        pytest.skip("no PostgreSQL server is installed here (apt-get install postgresql)")
    with postgres_cluster(found) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("fedgrade.job.calibrate", calibrate_once)
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)


@dataclass(frozen=True, kw_only=True)
class Coordinated:
    """A small federation whose coordinator's folder is as a real one's, with its documents in a database."""

    federation: SmallFederation

    @classmethod
    def create(cls, root, address):
        federation = SmallFederation.create(root)
        federation.coordinator_key.save(root / "coordinator" / "key.pem")
        coordinated = cls(federation=federation)
        coordinated.use(address)
        return coordinated

    @property
    def folder(self):
        return CoordinatorFolder(root=self.federation.root)

    def use(self, address):
        (self.folder.root / "coordinator.yaml").write_text(settings_yaml(replace(SETTINGS, database=address)))

    def begin(self, spec=SPEC):
        job = self.federation.job(spec)
        self.folder.put_job(job)
        return job

    def run(self, cohort):
        return run_folder(self.folder, cohort, report=lambda _: None)

    @contextmanager
    def cohort(self, *, policy=POLICY):
        with self.federation.answers(policy=policy) as answers:
            yield InProcessCohort(sites=answers)

    def in_files(self, job: TrainingJob, *, policy=POLICY):
        """What the same job comes to with files: sites resend what they once sent, and are charged for nothing."""
        before = {name: self.federation.charges(name) for name in NAMES}
        shutil.rmtree(self.folder.root / "jobs")
        # As before the release: a ledger that has one lets nobody make another.
        *lines, _released = self.folder.ledger.read_bytes().splitlines(keepends=True)
        self.folder.ledger.write_bytes(b"".join(lines))
        self.use("files")
        self.folder.put_job(job)
        with self.cohort(policy=policy) as cohort:
            self.run(cohort)
        assert {name: self.federation.charges(name) for name in NAMES} == before
        return self.outcome(job)

    def outcome(self, job: TrainingJob):
        """Weights, counts and every document that the verifier reads of ``job``."""
        proof = verify_federation(self.folder.root)
        assert len(proof.jobs[job.digest].rounds) == STAGES
        assert {name: len(self.federation.charges(name)) for name in NAMES} == dict.fromkeys(NAMES, STAGES)
        release = self.federation.release(job).release
        kept = Folder(self.folder.job_folder(job))
        evidence = {name: kept.read(name) for part in ("receipts", "evaluation") for name in kept.names(part)}
        return release.weights_digest, release.counts, release.contributions, evidence


@pytest.fixture
def coordinated(tmp_path, cluster):
    return Coordinated.create(tmp_path / "federation", cluster.address())


@contextmanager
def opened(address, *, schema="laws", machine="one", patience_seconds=0.0):
    with Database(address, schema=schema, machine=machine, patience_seconds=patience_seconds) as database:
        database.prepare(dict[str, bytes]().items)
        yield database


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


# The same job.


def test_a_job_comes_to_the_same_in_files_and_in_the_database(coordinated):
    job = coordinated.begin()
    with coordinated.cohort() as cohort:
        coordinated.run(cohort)
    in_database = coordinated.outcome(job)
    assert not (coordinated.folder.job_folder(job) / "checkpoint").exists()
    assert in_database == coordinated.in_files(job)


def test_a_sum_under_masks_comes_to_the_same_in_files_and_in_the_database(tmp_path, cluster, monkeypatch):
    """Sites add no noise here: keys differ from federation to federation, and with them who sent which bytes."""
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", zeros)
    outcomes = []
    for address in ("files", cluster.address()):
        coordinated = Coordinated.create(tmp_path / f"federation-{len(outcomes)}", address)
        job = coordinated.begin(summing(minimum_sites=2))
        with coordinated.cohort(policy=SUMS) as cohort:
            coordinated.run(cohort)
        weights, counts, contributions, evidence = coordinated.outcome(job)
        outcomes.append((weights, counts, contributions, sorted(evidence)))
    assert outcomes[0] == outcomes[1]


class Meddled:
    """A cohort; something happens once, in the middle of the given request for contributions."""

    def __init__(self, cohort, happens, *, at):
        self.cohort, self.happens, self.left = cohort, happens, at

    def ask(self, requests, *, deadline_seconds):
        replies = self.cohort.ask(requests, deadline_seconds=deadline_seconds)
        self.left -= 1
        if self.left == 0:
            self.happens()
        return replies


@contextmanager
def back_soon(cluster):
    """Kills the server when it is called; it is started again meanwhile."""
    starting = threading.Timer(0.5, cluster.start)

    def kill():
        cluster.kill()
        starting.start()

    yield kill
    starting.join()


@pytest.mark.parametrize(
    ("asked", "name", "times"),
    [(3, "", 0), (0, f"receipts/{NAMES[1]}/00001.json", 1), (0, "checkpoint/latest.json", 2)],
    ids=["while sites work", "between two rows", "before the commit"],
)
def test_a_server_that_is_killed_and_comes_back_costs_nobody_anything(coordinated, cluster, asked, name, times):
    """In the second stage: when everybody has answered, or in the middle of the transaction that keeps it."""
    job, put, written = coordinated.begin(), Database._put, []

    def put_and_kill(self, cursor, document, content):
        put(self, cursor, document, content)
        written.append(document.partition(f"/{job.digest[:16]}/")[2])
        if written.count(name) == times and written[-1] == name:
            kill()

    with coordinated.cohort() as cohort, back_soon(cluster) as kill, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "_put", put_and_kill)
        coordinated.run(Meddled(cohort, kill, at=asked))
    assert coordinated.outcome(job) == coordinated.in_files(job)


def test_a_server_that_stays_away_ends_the_run_with_one_line_and_the_run_goes_on_later(
    coordinated, cluster, monkeypatch
):
    job = coordinated.begin()
    monkeypatch.setattr(database_module, "PATIENCE_SECONDS", 0.3)
    with coordinated.cohort() as cohort:
        with pytest.raises(
            DatabaseUnavailable, match=r"schema fedgrade_.*tried for 0.3 s; what was kept before stands"
        ):
            coordinated.run(Meddled(cohort, cluster.kill, at=3))
        assert [len(coordinated.federation.charges(name)) for name in NAMES] == [2, 2, 2]
        cluster.start()
        coordinated.run(cohort)
    assert coordinated.outcome(job) == coordinated.in_files(job)


class PowerCutError(Exception):
    """This machine is gone."""


def burn():
    raise PowerCutError


def schema(folder):
    return f"fedgrade_{''.join(SigningKey.load(folder.key).public.fingerprint.split())}"


def test_another_machine_goes_on_with_key_ledger_and_settings_alone(coordinated, tmp_path):
    job, old, new = coordinated.begin(), coordinated.federation.root, tmp_path / "new"
    with coordinated.cohort() as cohort, pytest.raises(PowerCutError):
        coordinated.run(Meddled(cohort, burn, at=4))
    assert len(verify_federation(old).jobs[job.digest].rounds) == 2
    (new / "coordinator").mkdir(parents=True)
    for name in ("coordinator/key.pem", "coordinator/ledger.jsonl", "coordinator.yaml", "roster.json", "sites"):
        shutil.move(old / name, new / name)
    shutil.rmtree(old)
    moved = Coordinated(federation=replace(coordinated.federation, root=new))
    with moved.cohort() as cohort:
        moved.run(cohort)
    assert moved.outcome(job) == moved.in_files(job)


def test_an_old_copy_of_the_ledger_is_refused_beside_a_newer_checkpoint(coordinated):
    ledger, older = coordinated.folder.ledger, []
    coordinated.begin()

    def copy():
        older.append(ledger.read_bytes())

    with coordinated.cohort() as cohort:
        with pytest.raises(PowerCutError):
            coordinated.run(Meddled(Meddled(cohort, copy, at=2), burn, at=4))
        ledger.write_bytes(older[0])
        with pytest.raises(LedgerBroken, match=r"centre round 0: is done by the checkpoint.*restore its newest copy"):
            coordinated.run(Meddled(cohort, burn, at=1))


def test_copies_that_were_lost_or_altered_are_made_again_before_a_run(coordinated):
    job = coordinated.begin()
    with coordinated.cohort() as cohort:
        coordinated.run(cohort)
        expected, folder = coordinated.outcome(job), coordinated.folder.job_folder(job)
        (folder / "receipts" / NAMES[0] / "00001.json").write_bytes(b"altered")
        (folder / "receipts" / NAMES[0] / "00009.json").write_bytes(b"of a stage that never was")
        shutil.rmtree(folder / "evaluation")
        with coordinated.folder.kept(copies=EVERYTHING):
            pass
    assert coordinated.outcome(job) == expected


def test_only_one_machine_at_a_time_uses_a_federation(coordinated, tmp_path):
    other, one_more = CoordinatorFolder(root=tmp_path / "other"), coordinated.folder.kept
    shutil.copytree(coordinated.folder.root, other.root)
    job, busy = coordinated.federation.job(SPEC), r"in use by fedgrade on .*, process \d+ at .*one machine at a time"
    with one_more(), one_more(), pytest.raises(DatabaseUnavailable, match=busy):
        other.put_job(job)
    with other.kept(), pytest.raises(DatabaseUnavailable, match=busy):
        coordinated.folder.put_job(job)


def test_a_server_that_was_restarted_is_soon_held_again(cluster, caplog):
    with opened(cluster.address(), machine="A") as held, Hold(held, every_seconds=0.05) as hold:
        cluster.kill()
        deadline = time.monotonic() + 30
        for line in ("tried again in", "connected again"):
            while line not in caplog.text:
                assert time.monotonic() < deadline, line
                time.sleep(0.01)
            if line == "tried again in":
                cluster.start()
        with pytest.raises(UsedElsewhere), opened(cluster.address(), machine="B"):
            pass
        hold.require()


def test_who_lost_the_database_to_another_machine_is_told(cluster):
    with opened(cluster.address(), machine="A") as held:
        cluster.kill()
        cluster.start()
        with opened(cluster.address(), machine="B"), Hold(held, every_seconds=0.02) as hold:
            hold._thread.join(30)
            with pytest.raises(UsedElsewhere, match=r"this machine no longer serves: .*in use by fedgrade") as told:
                hold.require()
            assert "\n" not in str(told.value)


def test_what_is_served_is_held_for_this_machine(coordinated, tmp_path):
    other = CoordinatorFolder(root=tmp_path / "other")
    shutil.copytree(coordinated.folder.root, other.root)
    with coordinated.folder.kept(), coordinated.folder.held() as must_be_ours:
        must_be_ours()
        with pytest.raises(UsedElsewhere), other.held():
            pass
    coordinated.use("files")
    with coordinated.folder.held() as must_be_ours:
        must_be_ours()


def test_a_checkpoint_that_somebody_changed_ends_the_run_before_anybody_is_asked(coordinated, cluster):
    coordinated.begin()
    with coordinated.cohort() as cohort:
        with pytest.raises(PowerCutError):
            coordinated.run(Meddled(cohort, burn, at=3))
        flip = "set content = set_byte(content, 200, get_byte(content, 200) # 1) where name like '%.safetensors'"
        cluster.execute(f"update {schema(coordinated.folder)}.parts {flip}")
        with pytest.raises(DocumentRefused, match="has changed since it was written"):
            coordinated.run(Meddled(cohort, burn, at=1))


# Who is enrolled.


def test_a_folder_that_was_kept_in_files_moves_into_the_database_with_all_it_has(tmp_path, cluster):
    folder = CoordinatorFolder(root=tmp_path / "federation")
    create_coordinator(folder.root, SETTINGS, now=NOW)
    enrol(folder, join_request(), approve=lambda _: None, now=NOW)
    book = read_book(folder)
    (folder.root / "coordinator.yaml").write_text(settings_yaml(replace(SETTINGS, database=cluster.address())))
    revoke(folder, "north", reason="left", now=NOW)
    assert read_book(folder).events[:1] == book.events
    with folder.kept() as kept:
        assert kept.read(BOOK) == folder.book.read_bytes()


def test_the_database_knows_of_a_revocation_that_a_copied_folder_missed(tmp_path, cluster):
    folder, older = CoordinatorFolder(root=tmp_path / "federation"), CoordinatorFolder(root=tmp_path / "older")
    create_coordinator(folder.root, replace(SETTINGS, database=cluster.address()), now=NOW)
    enrol(folder, join_request(), approve=lambda _: None, now=NOW)
    shutil.copytree(folder.root, older.root)
    revoke(folder, "north", reason="its key was stolen", now=NOW)
    with older.kept():
        assert set(read_book(older).membership.former) == {"north"}
    shutil.rmtree(older.root / "coordinator" / "witnessed", ignore_errors=True)
    older.book.unlink()
    with older.kept():
        assert older.book.read_bytes() == folder.book.read_bytes()


def test_whoever_may_write_to_the_database_enrols_nobody(tmp_path, cluster):
    """With what a database's owner has: every document, none of the coordinator's keys."""
    folder = CoordinatorFolder(root=tmp_path / "federation")
    create_coordinator(folder.root, replace(SETTINGS, database=cluster.address()), now=NOW)
    with folder.kept() as kept:
        before = kept.read(BOOK)
    enrol(folder, join_request(), approve=lambda _: None, now=NOW)
    revoke(folder, "north", reason="its key was stolen", now=NOW)
    bundle, ledger = folder.bundle.read_bytes(), folder.ledger.read_bytes()
    emptied = replace(read_book(folder), events=())
    for content, why in (
        (encode(emptied), "was not signed by this coordinator"),
        (seal(emptied, SigningKey.generate()), "was not signed by this coordinator"),
        (before, "was put back to an older one"),
    ):
        with opened(cluster.address(), schema=schema(folder), machine=database_module._machine(folder.root)) as owner:
            owner.write({BOOK: content})
        with pytest.raises(FedgradeError, match=why):
            bring_up_to_date(folder, now=NOW)
    assert (folder.bundle.read_bytes(), folder.ledger.read_bytes()) == (bundle, ledger)
    assert folder.read_roster().sites == {}


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


# What coordinator.yaml may say; no server is needed to know.


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://fed@db.example/fed",
        "postgresql://fed@db.example:5433/fed?sslmode=verify-full&sslrootcert=/etc/fed/ca.pem",
        "postgresql://one.example,two.example:5433/fed?target_session_attrs=read-write",
        "postgresql://fed@/fed?host=/run/postgresql",
        "postgresql://fed@localhost/fed?sslmode=disable",
        "postgresql://fed@[::1]:5432/fed?sslmode=disable",
        "postgresql:///?service=fedgrade",
    ],
)
def test_settings_take_an_address_without_secrets(address, tmp_path):
    (tmp_path / "coordinator.yaml").write_text(settings_yaml(replace(SETTINGS, database=address)))
    assert read_settings(tmp_path).database == address


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("postgresql://fed:hidden@db.example/fed", "holds a password; .*PGPASSFILE"),
        ("postgresql://fed:hi/dd@en@db.example/fed", "holds a password"),
        ("postgresql://fed@db.example/fed?password=hidden", "holds a password"),
        ("postgresql://fed@db.example/fed?sslpassword=hidden", "holds a password"),
        ("postgresql://fed@db.example/fed?sslmode=require", "sslmode 'require' lets others listen"),
        ("postgresql://fed@127.0.0.1,db.example/fed?sslmode=disable", "lets others listen"),
        ("postgresql://fed@/fed?host=db.example&sslmode=prefer", "lets others listen"),
        ("postgresql:///?service=fedgrade&sslmode=disable", "lets others listen"),
        ("postgresql://fed@db.example/fed?options=-csearch_path", "option 'options' is none of"),
        ("postgresql://fed@db.example/fed?sslmode=verify-full&sslmode=disable", "an option appears twice"),
        ("mysql://fed@db.example/fed", "neither files nor like postgresql://"),
        ("postgresql://fed@db.example/fed\nhost: evil", "neither files nor"),
        ("", "neither files nor"),
    ],
)
def test_settings_refuse_an_address_that_holds_secrets_or_lets_others_listen(address, why):
    with pytest.raises(DocumentRefused, match=f"coordinator.database: .*{why}") as caught:
        replace(SETTINGS, database=address)
    assert "hidden" not in str(caught.value)
