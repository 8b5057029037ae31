"""A run that was interrupted is taken up again; one that was told to stop is not, whatever dies in between."""

import time
from functools import cache

import pytest
from click.testing import CliRunner

from fedgrade.cli import cli
from fedgrade.errors import LedgerBroken, StoreUnavailable
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.release import DOCUMENT
from fedgrade.federation.rounds import RoundLog
from fedgrade.job import plan_job
from fedgrade.trust.ledger import read_ledger
from fedgrade.trust.records import Released
from server import served_run
from server.attached import NotServing
from server.control import ControlRefused
from server.coordinate import run_folder
from server.coordinator_folder import CoordinatorFolder, Patience
from server.interrupted_run import InterruptedRun
from server.nodes_file import write_nodes
from server.run_record import RunKeeper, RunStopped, let_go_on, note_given_up, order_stop, read_record, recorded
from server.runs import known_runs
from tests.federation.small_federation import DECLARED, NAMES, SmallFederation, quick_noise, with_privacy

NODES = {name: number for number, name in enumerate(NAMES, start=1)}


class SuperLink:
    """What a SuperLink answers to the three questions of its admin listener that are asked here."""

    def __init__(self):
        self.submitted = 0
        self.going = ()
        self.nodes = frozenset(NODES.values())
        self.away = False

    def unfinished(self):
        if self.away:
            raise ControlRefused("SuperLink: away")
        return self.going

    def online(self):
        return self.nodes

    def submit(self, _config):
        self.submitted += 1
        return self.submitted


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
        patch.setattr("server.interrupted_run._LOOK_SECONDS", 0.0)
        patch.setattr("server.interrupted_run._PAUSES_SECONDS", (0.0, 0.0, 0.0))
        yield


@pytest.fixture
def federation(tmp_path):
    federation = SmallFederation.create(tmp_path / "federation")
    federation.coordinator_key.save(federation.root / "coordinator" / "key.pem")
    return federation


@pytest.fixture
def folder(federation):
    folder = CoordinatorFolder(root=federation.root)
    folder.put_job(planned(), Patience(deadline_seconds=0.5))
    write_nodes(folder.root, NODES)
    return folder


@cache
def planned(nonce="0"):
    return plan_job(with_privacy(rounds=1), declared_items=dict.fromkeys(NAMES, DECLARED), nonce=nonce)


@pytest.fixture
def where(folder):
    """The folder of a job whose run began, and whose process was killed."""
    RunKeeper(folder.job_folder(planned()), planned())
    return folder.job_folder(planned())


def stop(folder):
    return CliRunner().invoke(cli, ["stop", str(folder.root)])


def look(run, times=2):
    for _ in range(times):
        run.follow()
        run._beside.wait()


@pytest.mark.usefixtures("where")
def test_a_run_whose_process_is_gone_is_submitted_once_enough_sites_are_online(folder):
    superlink = SuperLink()
    superlink.nodes = frozenset({1})
    run = InterruptedRun(superlink, folder)
    look(run)
    assert superlink.submitted == 0
    superlink.nodes = frozenset({1, 3})
    look(run, 1)
    assert superlink.submitted == 1
    superlink.going = (1,)
    look(run)
    assert superlink.submitted == 1


def test_a_run_that_is_killed_before_it_wrote_a_word_is_taken_up(folder):
    superlink = SuperLink()
    assert served_run._submitted(superlink, folder, planned()) == 1
    look(InterruptedRun(superlink, folder), 1)
    assert superlink.submitted == 2
    # Also one that a person let go on after it had failed.
    note_given_up(folder.job_folder(planned()), read_record(folder.job_folder(planned())), "died")
    look(InterruptedRun(superlink, folder), 1)
    assert superlink.submitted == 2
    served_run._submitted(superlink, folder, planned())
    look(InterruptedRun(superlink, folder), 1)
    assert superlink.submitted == 4


@pytest.mark.parametrize("before", [None, "failed"])
def test_what_could_not_be_submitted_is_not_taken_up(folder, before):
    superlink, where = SuperLink(), folder.job_folder(planned())
    if before is not None:
        RunKeeper(where, planned()).end(before, "too few sites")

    def refuse(_config):
        raise ControlRefused("SuperLink: no")

    superlink.submit, submit = refuse, superlink.submit
    with pytest.raises(ControlRefused):
        served_run._submitted(superlink, folder, planned())
    why = "was not begun: SuperLink: no" if before is None else "too few sites"
    assert (read_record(where).outcome, read_record(where).why) == ("failed", why)
    superlink.submit = submit
    look(InterruptedRun(superlink, folder))
    assert superlink.submitted == 0


def test_a_run_that_dies_again_and_again_is_left_to_a_person_whoever_restarts_meanwhile(folder, where, caplog):
    superlink = SuperLink()
    for _ in range(5):
        # `fedgrade serve` was killed with the run, or the SuperLink alone.
        run = InterruptedRun(superlink, folder)
        for _ in range(3):
            run.restarted()
            look(run, 1)
    assert superlink.submitted == 3
    record = read_record(where)
    assert (record.outcome, record.why) == ("failed", "its process died 4 times in stage 1; see logs/")
    assert caplog.text.count(f"then `fedgrade resume {folder.root}`") == 1
    # A person has looked at it, and the run begins again.
    let_go_on(where, on=False)
    keeper = RunKeeper(where, planned())
    assert read_record(where).tries == 0
    look(run)
    assert read_record(where).tries == 1
    # A stage that is finished starts the count anew.
    keeper.stage(1)
    assert (read_record(where).done, read_record(where).tries) == (1, 0)


@pytest.mark.usefixtures("where")
def test_between_tries_there_is_a_growing_pause(folder, monkeypatch):
    monkeypatch.setattr("server.interrupted_run._PAUSES_SECONDS", (5.0, 25.0, 25.0))
    superlink, pauses = SuperLink(), []
    run = InterruptedRun(superlink, folder)
    for tries in (1, 2, 3):
        look(run)
        assert superlink.submitted == tries
        pauses.append(round(run._not_before - time.monotonic()))
        run._not_before = 0.0
    assert pauses == [5, 25, 25]


def test_what_fails_is_tried_again_and_ends_nothing(folder, where, caplog):
    superlink = SuperLink()
    run = InterruptedRun(superlink, folder)
    superlink.away = True
    look(run)
    assert "interrupted run not taken up yet: SuperLink: away" in caplog.text
    superlink.away = False
    # As where there is no room: the try cannot be noted, and is not made.
    (where / "run.json.part").mkdir()
    look(run)
    assert superlink.submitted == 0
    (where / "run.json.part").rmdir()
    look(run, 1)
    assert superlink.submitted == 1


def test_a_run_that_is_told_to_stop_before_its_process_ends_is_not_taken_up_again(folder, where):
    superlink = SuperLink()
    run = InterruptedRun(superlink, folder)
    order_stop(where, "by `fedgrade stop`")
    look(run, 4)
    look(InterruptedRun(superlink, folder), 4)
    assert superlink.submitted == 0
    assert [(one.state, one.why) for one in known_runs(folder)] == [("stopped", "by `fedgrade stop`")]
    let_go_on(where, on=False)
    look(run)
    assert superlink.submitted == 1


def test_a_process_that_is_told_to_stop_ends_after_its_stage_and_one_that_begins_does_not_begin(federation, folder):
    where = folder.job_folder(planned())
    with federation.answers() as answers:
        cohort = InProcessCohort(sites=answers)

        def stop_it(progress):
            order_stop(where, "by `fedgrade stop`")
            done.append(progress.stage)

        done = []
        with pytest.raises(RunStopped, match="stopped by `fedgrade stop`; its checkpoint stands"):
            run_folder(folder, cohort, report=stop_it)
        assert done == [1]
        assert (read_record(where).outcome, read_record(where).done) == ("stopped", 2)
        with pytest.raises(RunStopped):
            run_folder(folder, cohort, report=stop_it)
        assert done == [1]
        let_go_on(where, on=False)
        run_folder(folder, cohort, report=lambda _: None)
    assert read_record(where).outcome == "released"


def test_an_order_that_was_damaged_stops_too(where):
    (where / "stop.json").write_bytes(b"\x00")
    assert read_record(where).outcome == "stopped"
    with pytest.raises(RunStopped), recorded(where, planned()):
        raise AssertionError


def test_stop_ends_an_interrupted_run_also_where_nobody_serves(folder, where):
    said = stop(folder)
    assert said.exit_code == 0, said.output
    assert "had been interrupted; nobody takes it up now but `fedgrade resume" in said.output
    assert read_record(where).outcome == "stopped"
    superlink = SuperLink()
    look(InterruptedRun(superlink, folder), 4)
    assert superlink.submitted == 0
    # Of a run that is stopped there is nothing left to stop.
    assert isinstance(stop(folder).exception, NotServing)


def test_stop_without_a_job_says_so(federation):
    assert stop(CoordinatorFolder(root=federation.root)).output == "no run is on\n"


def test_stop_that_cannot_be_written_stops_nothing_and_says_so(folder, where):
    (where / "stop.json.part").mkdir()
    said = stop(folder)
    assert isinstance(said.exception, StoreUnavailable)
    assert "nothing was stopped" in str(said.exception)


@pytest.mark.usefixtures("where")
def test_a_run_whose_job_was_replaced_is_promised_to_nobody(folder):
    folder.put_job(planned("1"))
    replaced = next(run for run in known_runs(folder) if run.job == planned().digest)
    assert (replaced.state, replaced.why) == ("interrupted", "its process was ended, and another job took its place")


def test_a_job_is_released_once_however_often_it_is_resumed(federation, folder, caplog):
    with federation.answers() as answers:
        cohort = InProcessCohort(sites=answers)
        first = run_folder(folder, cohort, report=lambda _: None)
    # Nobody is asked: there is nobody.
    assert run_folder(folder, InProcessCohort(sites={}), report=lambda _: None) == first
    assert "was released before" in caplog.text
    assert releases(federation, folder) == [first]
    assert read_record(folder.job_folder(planned())).outcome == "released"
    (folder.job_folder(planned()) / "release" / DOCUMENT).unlink()
    with pytest.raises(LedgerBroken, match="a job is released once"):
        run_folder(folder, InProcessCohort(sites={}), report=lambda _: None)


def test_a_release_that_was_signed_before_a_kill_is_the_one_that_is_entered(federation, folder, monkeypatch):
    release, digests = RoundLog.release, []

    def killed(_self, _job, release_digest, *, now):
        digests.append((release_digest, now))
        raise KeyboardInterrupt

    with federation.answers() as answers:
        cohort = InProcessCohort(sites=answers)
        with monkeypatch.context() as patch:
            patch.setattr(RoundLog, "release", killed)
            with pytest.raises(KeyboardInterrupt):
                run_folder(folder, cohort, report=lambda _: None)
        assert RoundLog.release is release
        while int(time.time()) == int(digests[0][1].timestamp()):
            time.sleep(0.05)
        assert run_folder(folder, cohort, report=lambda _: None) == digests[0][0]
    assert releases(federation, folder) == [digests[0][0]]


def releases(federation, folder):
    entries = read_ledger(folder.ledger, key=federation.coordinator_key.public)
    return [entry.body.release_digest for entry in entries if isinstance(entry.body, Released)]
