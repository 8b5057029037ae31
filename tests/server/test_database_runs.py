"""Runs and enrolments kept in a real PostgreSQL: the same to the last bit; kills, thieves, two machines."""

import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest

from fedgrade.errors import DocumentRefused, FedgradeError, LedgerBroken
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.store import Folder
from fedgrade.federation.verification import verify_federation
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey
from server import database as database_module
from server.coordinate import run_folder
from server.coordinator_file import settings_yaml
from server.coordinator_folder import BOOK, CoordinatorFolder
from server.database import Database, DatabaseUnavailable, UsedElsewhere
from server.enrolment import bring_up_to_date, create_coordinator, enrol, node_keys, read_book, revoke
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
from tests.server.postgres_server import opened
from tests.server.test_enrolment import SETTINGS
from tests.server.test_enrolment import request as join_request

SPEC = with_privacy(rounds=1)  # centre, one round, evaluation
STAGES = 3
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


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


def test_whoever_may_write_to_the_database_brings_no_replaced_connection_key_back(tmp_path, cluster):
    folder = CoordinatorFolder(root=tmp_path / "federation")
    create_coordinator(folder.root, replace(SETTINGS, database=cluster.address()), now=NOW)
    enrol(folder, join_request(number=5), approve=lambda _: None, now=NOW)
    with folder.kept() as kept:
        before = kept.read(BOOK)
    enrol(folder, join_request(number=7, made=NOW + timedelta(days=1)), approve=lambda _: None, now=NOW)
    with opened(cluster.address(), schema=schema(folder), machine=database_module._machine(folder.root)) as owner:
        owner.write({BOOK: before})
    with folder.kept(), pytest.raises(DocumentRefused, match="a key that was replaced"):
        node_keys(folder)


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
