"""What serves stays: processes that end are started again, what fails meanwhile is tried again, who follows is told."""

import contextlib
import signal
import socket
import threading
import time

import pytest

from fedgrade.federation.progress import Progress
from fedgrade.trust.identity import SigningKey
from server import served_run
from server.attached import only_server
from server.control import ControlRefused
from server.coordinator_folder import CoordinatorFolder
from server.deployment import Deployment, DeploymentFailed
from server.engines import followed
from server.enrolment import create_coordinator, enrol, revoke
from server.local_federation import LocalFederation
from server.nodes_file import NAME, read_nodes
from server.progress_file import append
from server.run_record import RunKeeper, note_given_up, order_stop, read_record
from server.serving import _Certificates, _NodeList, _Processes, _Watchdog
from tests.federation.small_federation import NAMES, SmallFederation
from tests.server.test_interrupted_run import planned
from tests.server.test_leaving import LATER, NOW, SETTINGS, wish

PATIENCE = 60.0
STAGE = Progress(
    stage=2, stages=5, purpose="train", answered=1, participants=1, finished="2026-11-21T12:00:00Z", absent={}
)
A = NAMES[0]


class SuperLink:
    """What a SuperLink answers on its admin listener after it was started again: it knows no run and no node."""

    def __init__(self):
        self.listed = {}

    def status(self, run_id):
        raise ControlRefused(f"SuperLink: no run {run_id}")

    def unfinished(self):
        return ()

    def logs(self, _run_id):
        return iter(())

    def nodes(self):
        return ()

    def register_key(self, key, name):
        self.listed[name] = key
        return len(self.listed)


@pytest.fixture
def folder(tmp_path):
    federation = SmallFederation.create(tmp_path / "federation", names=NAMES[:1])
    (federation.root / "sites" / A).mkdir(parents=True, exist_ok=True)
    (federation.root / "sites" / A / "node_key.pub").write_text("a public key\n")
    return CoordinatorFolder(root=federation.root)


@pytest.fixture
def where(folder):
    """The folder of a job whose run began, and whose process was killed."""
    RunKeeper(folder.job_folder(planned()), planned())
    return folder.job_folder(planned())


@pytest.mark.flower
def test_a_superlink_that_cannot_be_started_again_is_tried_again_until_it_can(tmp_path, caplog):
    with Deployment(tmp_path) as deployment:
        processes = _Processes(deployment)
        assert processes.alive()
        assert not processes.restarted()
        deployment.process("superlink").kill()
        deployment.process("superlink").wait()
        port = int(deployment.address.rpartition(":")[2])
        with contextlib.closing(socket.socket()) as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", port))
            taken.listen()
            # It has not lived long, so that the next one has to wait.
            assert not processes.alive()
            assert "started again in 1 s: superlink ended with code -9" in caplog.text
            eventually(lambda: processes.alive() or "not started again, tried in 2 s" in caplog.text)
            assert not processes.alive()
        eventually(processes.alive)
        assert processes.restarted()
        assert not processes.restarted()
        assert deployment.control.nodes() == ()


@pytest.mark.flower
def test_a_superlink_that_lives_and_answers_nobody_is_ended_and_another_started(tmp_path, monkeypatch, caplog):
    """Flower's client would ask it for ever, and the run would wait with it."""
    monkeypatch.setattr("server.serving._ASK_SECONDS", 0.2)
    with Deployment(tmp_path) as deployment:
        deployment.control._client._client.timeout = 2.0
        processes, watchdog, superlink = _Processes(deployment), _Watchdog(deployment), deployment.process("superlink")

        def followed():
            watchdog.follow()
            return superlink.poll() is not None

        for _ in range(20):
            assert not followed()
            time.sleep(0.1)
        # Once is no reason: it may have had much to do.
        superlink.send_signal(signal.SIGSTOP)
        eventually(lambda: "no sign of life (1 of 2)" in caplog.text or followed())
        superlink.send_signal(signal.SIGCONT)
        watchdog._beside.wait()
        eventually(lambda: followed() or watchdog._silences == 0)
        assert superlink.poll() is None
        superlink.send_signal(signal.SIGSTOP)
        eventually(followed)
        assert superlink.wait(PATIENCE) == -signal.SIGKILL
        assert "was asked 2 times and does not answer" in caplog.text
        eventually(processes.alive)
        assert processes.restarted()
        assert deployment.control.nodes() == ()


class Heard:
    """What somebody who follows a run is shown."""

    def __init__(self):
        self.features_seen, self.progress = [], []

    def features(self, percent):
        self.features_seen.append(percent)

    def watch(self, progress):
        self.progress.append(progress)


def test_a_folder_that_was_put_together_again_is_followed_from_its_next_stage_on(folder):
    """Progress is for eyes alone: neither a database nor anybody's copies keep it."""
    heard = Heard()
    folder.progress.unlink(missing_ok=True)
    with followed(LocalFederation(root=folder.root), heard):
        eventually(lambda: heard.features_seen)
        append(folder.progress, STAGE)
        eventually(lambda: heard.progress)
    assert heard.progress == [STAGE]


def test_a_disk_that_is_full_is_waited_for_by_who_serves(folder, caplog):
    superlink = SuperLink()
    nodes = _NodeList(superlink, folder)
    nodes.bring_up_to_date()
    nodes.follow()
    assert list(superlink.listed) == [A]
    before = read_nodes(folder.root)
    superlink.listed.clear()
    nodes.forget()
    # As where there is no room.
    (folder.root / NAME).rename(folder.root / "before")
    (folder.root / NAME).mkdir()
    nodes.follow()
    assert "enrolments not taken note of yet" in caplog.text
    nodes.follow()
    assert caplog.text.count("enrolments not taken note of yet") == 1
    (folder.root / NAME).rmdir()
    nodes._next = 0.0
    nodes.follow()
    assert read_nodes(folder.root) == before


def test_certificates_for_which_there_is_no_room_are_renewed_a_minute_later(folder, caplog):
    certificates = _Certificates(folder)
    (folder.root / "superlink").write_bytes(b"")
    certificates._next = 0.0
    certificates.follow()
    certificates._beside.wait()
    assert "certificates and bundle are as before" in caplog.text
    assert 0 < certificates._next - time.monotonic() <= 60
    (folder.root / "superlink").unlink()
    certificates._next = 0.0
    certificates.follow()
    certificates._beside.wait()
    assert (folder.root / "superlink" / "ca.pem").exists()


def test_a_revocation_does_not_wait_for_certificates(folder, monkeypatch):
    """As where bundle and certificates wait for a database that is away."""
    back = threading.Event()
    monkeypatch.setattr("server.serving.certify", lambda *_, **__: back.wait(PATIENCE))
    certificates = _Certificates(folder)
    certificates._next = 0.0
    certificates.follow()
    assert certificates._beside.busy
    certificates.follow()
    back.set()
    certificates._beside.wait()
    assert not certificates._beside.busy


def follow(folder):
    with only_server(folder.root):
        served_run._follow(SuperLink(), 7, folder, planned())


@pytest.mark.usefixtures("where")
def test_who_follows_a_run_that_nobody_takes_up_after_a_restart_is_told_in_one_line(folder, monkeypatch):
    monkeypatch.setattr(served_run, "_TAKEN_UP_SECONDS", 0.0)
    with pytest.raises(DeploymentFailed, match=r"run 7: its SuperLink was started again, .*nobody took the run up"):
        follow(folder)


def test_who_follows_a_run_is_told_that_it_was_given_up_or_stopped(folder, where):
    record = read_record(where)
    note_given_up(where, record, "its process died 3 times")
    with pytest.raises(DeploymentFailed, match="run 7 failed: its process died 3 times; its checkpoint stands"):
        follow(folder)
    RunKeeper(where, planned())
    order_stop(where, "by `fedgrade stop`")
    with pytest.raises(DeploymentFailed, match="run 7 stopped: by `fedgrade stop`"):
        follow(folder)


def test_nobody_is_told_to_resume_a_job_that_has_too_few_sites_left(tmp_path):
    folder = CoordinatorFolder(root=tmp_path / "coordinator")
    create_coordinator(folder.root, SETTINGS, now=NOW)
    for number, site in enumerate(NAMES, start=1):
        raw = wish(site, SigningKey.generate(), number=number)
        enrol(folder, raw, approve=lambda _: None, now=NOW)
    told = []
    for gone in (None, *NAMES[:2]):
        if gone is not None:
            revoke(folder, gone, reason="its key was stolen", now=LATER)
        told.append(str(served_run._not_completed(7, "failed", "why", folder, planned())))
    resume = f"run 7 failed: why; its checkpoint stands, and `fedgrade resume {folder.root}` goes on from there"
    never = (
        f"run 7 failed: why; {NAMES[0]}, {NAMES[1]} revoked, too few are left: start another job with `fedgrade run`"
    )
    assert told == [resume, resume, never]


def eventually(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
