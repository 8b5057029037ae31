"""Strangers find each other: a coordinator and two partners, each with its own folder and processes, as typed.

What a real coordinator and real partners would type on three machines, typed here on one: real photos, real processes,
TLS on loopback, nothing written by hand but a number in a policy. The tests follow each other and share one federation.
"""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import pytest

from clients.fleet import FleetAccess, FleetConnection, LinkRefused
from clients.node_key import load_node_key
from fedgrade.cli import main
from fedgrade.data import elpv
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.enrolment import read_bundle, read_request, write_bundle
from fedgrade.trust.identity import SigningKey
from server.configure import compose_job
from server.coordinator_folder import CoordinatorFolder
from tests.server.few_photos import POOLING, few, shared_backbones

pytestmark = pytest.mark.flower

PARTNERS = STAYS, GONE = "recycler-a", "recycler-b"
PATIENCE = 300.0
JOB = ("data.minimum_items=10", "aggregation.minimum_sites=1", POOLING)
FEDGRADE = (sys.executable, "-c", "from fedgrade.cli import main; main()")


def typed(*arguments, code=0):
    """What the command answers, typed in this process; it must end with ``code``."""
    said, left = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setattr(sys, "argv", ["fedgrade", *map(str, arguments)])
        patch.setenv("COLUMNS", "300")
        try:
            main()
        except SystemExit as ended:
            left = ended.code
    assert left == code, f"{arguments}: {said.getvalue()}"
    return said.getvalue()


def started(log, *arguments):
    with log.open("ab") as stream:
        return subprocess.Popen([*FEDGRADE, *map(str, arguments)], stdout=stream, stderr=subprocess.STDOUT)


def eventually(condition, *, what, while_runs=None):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        assert while_runs is None or while_runs.poll() is None, what.read_text()
        time.sleep(0.3)
    return found


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def fingerprint_in(said):
    (found,) = re.findall(r"fingerprint[^:]*: ((?:[0-9a-f]{4} ?){8})", said)
    return found.strip()


class Federation:
    """Folders of a coordinator and of partners, and the processes that run in them."""

    def __init__(self, root):
        self.root, self.processes = root, {}
        self.coordinator = root / "federation"
        self.fingerprint = ""

    def folder(self, site):
        return self.root / site

    def site_file(self, site):
        return self.folder(site) / "site.yaml"

    def serve(self):
        log = self.root / "serve.log"
        log.unlink(missing_ok=True)
        self.processes["serve"] = started(log, "serve", self.coordinator)
        eventually(lambda: "SuperLink at" in log.read_text(), what=log, while_runs=self.processes["serve"])

    def init(self, site, manifest):
        (self.root / f"{site}.csv").write_bytes(manifest)
        said = typed(
            *("site", "init", self.folder(site), "--site", site, "--photos", elpv.package_photos()),
            *("--manifest", self.root / f"{site}.csv", "--declared-items", 50, "--photos-per-item", 1),
            *("--grades", ",".join(compose_job([]).grading.labels)),
        )
        (self.folder(site) / "backbones").symlink_to(self.root / "backbones")
        # Only here: with so few, the sum says much about each.
        policy = self.folder(site) / "policy.yaml"
        policy.write_text(policy.read_text().replace("minimum_participants: 3", "minimum_participants: 2"))
        return fingerprint_in(said)

    def enrol(self, site, fingerprint, **settings):
        request = self.folder(site) / "join-request.json"
        return typed("enrol", self.coordinator, request, "--fingerprint", fingerprint, **settings)

    def join(self, site, **settings):
        bundle = self.coordinator / "bundle.json"
        return typed("site", "join", bundle, self.site_file(site), "--fingerprint", self.fingerprint, **settings)

    def up(self, site):
        self.processes[site] = started(self.root / f"{site}.log", "site", "up", self.site_file(site))

    def online(self):
        said = typed("roster", self.coordinator)
        return {site for site in PARTNERS if re.search(rf"{site} .*\bonline\b", said)}

    def progress(self):
        path = CoordinatorFolder(root=self.coordinator).progress
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, *overrides):
        return ("run", "--federation", self.coordinator, "--engine", "served", *JOB, *overrides)

    def verified(self):
        """The proof over the coordinator's folder, with newest copies of the partners' ledgers put into it."""
        for site in PARTNERS:
            copy = self.coordinator / "sites" / site / "ledger.jsonl"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder(site) / "ledger.jsonl", copy)
        return verify_federation(self.coordinator)

    def end(self, name):
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(PATIENCE)


@pytest.fixture(scope="module")
def manifests():
    spec = compose_job([])
    return few(elpv.site_manifests, recyclers=len(PARTNERS))(spec.grading, test_fraction=spec.data.test_fraction)


@pytest.fixture(scope="module")
def federation(tmp_path_factory, manifests):
    """Coordinator and partners, enrolled, joined and up."""
    federation = Federation(tmp_path_factory.mktemp("strangers"))
    (federation.root / "backbones").symlink_to(shared_backbones(tmp_path_factory))
    public, admin = free_ports(2)
    said = typed(
        *("coordinator", "init", federation.coordinator, "--host", "127.0.0.1", "--interface", "127.0.0.1"),
        *("--public-port", public, "--admin-port", admin),
    )
    federation.fingerprint = fingerprint_in(said)
    try:
        federation.serve()
        for site in PARTNERS:
            said = federation.enrol(site, federation.init(site, manifests[site]))
            # The SuperLink was running all along.
            assert "the SuperLink lets it in" in said
        for site in PARTNERS:
            federation.join(site)
            federation.up(site)
        eventually(lambda: federation.online() == set(PARTNERS), what="nodes online")
        yield federation
    finally:
        for name in list(federation.processes):
            federation.end(name)


@pytest.fixture(scope="module")
def first_bundle(federation):
    """The bundle before anybody was revoked."""
    return (federation.coordinator / "bundle.json").read_bytes()


def test_a_partner_that_is_revoked_in_mid_run_is_refused_and_a_model_comes_of_it_without(federation, first_bundle):
    assert set(read_bundle(first_bundle).roster.sites) == set(PARTNERS)
    log, stages = federation.root / "run.log", 42
    following = started(log, *federation.run("privacy.rounds=40"))

    def lines():
        return [line for line in federation.progress() if line["stages"] == stages]

    eventually(lines, what=log, while_runs=following)
    # Nobody else runs a job meanwhile; and whoever submitted it may leave.
    assert "runs a job here" in typed(*federation.run(), code=1)
    following.send_signal(signal.SIGINT)
    assert following.wait(PATIENCE) == 130
    assert "goes on without you" in log.read_text()
    assert "follow it with" in typed(*federation.run(), code=1)

    said = typed("revoke", federation.coordinator, GONE, "--reason", "trial of a revocation")
    # The command returns when the SuperLink has struck the node off.
    assert "the SuperLink refuses it from now on" in said
    refused(federation, GONE)
    eventually(lambda: lines()[-1]["answered"] == 1, what="a stage without it")

    assert "stopped" in typed("stop", federation.coordinator)
    assert "no run is on" in typed("stop", federation.coordinator)
    assert "stopped: by `fedgrade stop`" in typed("runs", federation.coordinator)
    watched = typed("watch", federation.coordinator, "--once")
    assert re.search(rf"{GONE} missing since stage \d+, [\d:]+: revoked", watched), watched
    assert "model release" in typed("resume", federation.coordinator)
    assert (lines()[-1]["stage"], lines()[-1]["answered"]) == (stages, 1)
    assert re.search(rf"{stages} of {stages} +released", typed("runs", federation.coordinator))
    assert "nobody was asked again" in typed("resume", federation.coordinator)
    assert federation.online() == {STAYS}
    assert "refused" in typed("site", "status", federation.site_file(GONE))
    proof = federation.verified()
    (job,) = proof.jobs.values()
    assert job.release is not None
    counted = [GONE in closed.receipts for closed in job.rounds]
    assert len(counted) == stages
    assert (counted[0], counted[-1]) == (True, False)
    assert counted == sorted(counted, reverse=True)
    assert f"{GONE} was revoked" in typed("verify", federation.coordinator)


def refused(federation, site):
    """The SuperLink refuses whoever holds the site's node key."""
    connection = FleetConnection(
        FleetAccess(
            address=read_bundle((federation.coordinator / "bundle.json").read_bytes()).address,
            root_certificate=(federation.folder(site) / "ca.pem").read_bytes(),
            key=load_node_key(federation.folder(site) / "node_key"),
            max_message_bytes=1000,
            heartbeat_seconds=10.0,
        )
    )
    with pytest.raises(LinkRefused):
        connection.activate()
    connection.close()


def test_the_others_learn_who_left_and_no_older_bundle_comes_back(federation, first_bundle):
    assert f"left: {GONE}" in federation.join(STAYS)
    assert "it was revoked" in federation.join(GONE, code=1)
    old = federation.root / "old.json"
    old.write_bytes(first_bundle)
    said = typed("site", "join", old, federation.site_file(STAYS), code=1)
    assert "ask the coordinator for the newest" in said


def test_papers_that_were_tampered_with_or_are_another_s_are_refused(federation):
    site, paper = STAYS, federation.root / "paper.json"
    newest = read_bundle((federation.coordinator / "bundle.json").read_bytes())
    usurper = SigningKey.generate()
    theirs = replace(newest, sequence=99, roster=replace(newest.roster, coordinator=usurper.public))
    for raw, said in (
        (write_bundle(theirs, usurper), "A site keeps its coordinator"),
        ((federation.coordinator / "bundle.json").read_bytes().replace(b"A", b"B", 1), "bundle: was altered"),
        ((federation.folder(site) / "join-request.json").read_bytes(), "payload type"),
    ):
        paper.write_bytes(raw)
        assert said in typed("site", "join", paper, federation.site_file(site), code=1)
    request = (federation.folder(site) / "join-request.json").read_bytes()
    key = read_request(request).key
    paper.write_bytes(request.replace(b"A", b"B", 1))
    said = typed("enrol", federation.coordinator, paper, "--fingerprint", key.fingerprint, code=1)
    assert "join request: was altered" in said
    paper.write_bytes(request)
    assert "was granted" in federation.enrol(site, key.fingerprint, code=1)


def test_the_coordinator_ends_cleanly_and_finds_its_partners_again(federation):
    assert federation.end("serve") == 0
    assert "no SuperLink serves it" in typed("roster", federation.coordinator)
    assert "start one with" in typed(*federation.run(), code=1)
    federation.serve()
    eventually(lambda: federation.online() == {STAYS}, what="nodes online again")


def test_a_partner_leaves_with_all_that_it_was_paid_for_delivered(federation):
    ledger = federation.folder(STAYS) / "ledger.jsonl"
    before, node = ledger.read_bytes(), federation.processes[STAYS]
    # Of some forty answers; the last may have arrived although Flower told the node that it had not.
    assert len(list((federation.folder(STAYS) / "outbox").glob("*.pending"))) <= 1
    notice = federation.folder(STAYS) / "leave-notice.json"
    assert f"Send {notice}" in typed("site", "leave", federation.site_file(STAYS), "--yes", "--undelivered")
    assert node.wait(PATIENCE) == 0
    assert ledger.read_bytes() == before
    assert "left its coordinator" in typed("site", "up", federation.site_file(STAYS), code=1)
    said = typed("revoke", federation.coordinator, "--notice", notice)
    assert f"{STAYS} is revoked; the SuperLink refuses it from now on" in said
    assert "left by itself; its signed notice" in typed("roster", federation.coordinator)
