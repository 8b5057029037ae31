"""``fedgrade runs`` and ``watch``: what a real run writes down, read back as its coordinator reads it."""

import threading
from dataclasses import replace
from datetime import timedelta
from functools import cache

import pytest
from click.testing import CliRunner

from fedgrade.cli import cli
from fedgrade.errors import JobRefused, RoundFailed
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.job import plan_job
from fedgrade.trust.enrolment import utc_text
from server import progress_file
from server.attached import NotServing, only_server
from server.coordinate import run_folder
from server.coordinator_file import CoordinatorSettings
from server.coordinator_folder import CoordinatorFolder, Patience
from server.enrolment import create_coordinator
from server.run_now import Awaited, AwaitedFile, Refusals, RefusalsFile, read_awaited, read_refusals
from server.run_record import RunKeeper, order_stop, read_record
from server.runs import known_runs
from server.watch_command import RunEnded, _Watched
from tests.federation.small_federation import DECLARED, NAMES, POLICY, SmallFederation, quick_noise, with_privacy
from tests.server.run_view import NOW, big, stage

A, B, C = NAMES
ROUNDS = 3


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
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
    return folder


@cache
def planned(nonce="0"):
    """The same in every federation of these names; planned once, because accountants take their time."""
    return plan_job(with_privacy(rounds=ROUNDS), declared_items=dict.fromkeys(NAMES, DECLARED), nonce=nonce)


class Moody:
    """A cohort in which sites are silent, or dead, as a test says."""

    def __init__(self, answers):
        self._inner = InProcessCohort(sites=answers)
        self.silent = set()
        self.dead = False

    def ask(self, requests, *, deadline_seconds):
        if self.dead:
            raise KeyboardInterrupt
        there = {site: raw for site, raw in requests.items() if site not in self.silent}
        return self._inner.ask(there, deadline_seconds=deadline_seconds)


def typed(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli, list(map(str, arguments)))


def test_each_stage_says_who_was_missing_and_how(federation, folder):
    stages = []

    def after(progress):
        stages.append(progress)
        cohort.silent = {C} if progress.stage == 1 else set()

    with federation.answers() as answers:
        cohort = Moody(answers)
        run_folder(folder, cohort, report=after)
    assert [progress.absent for progress in stages] == [{}, {C: "silent"}, {C: "resting"}, {}, {}]
    assert list(progress_file.read_progress(folder.progress)) == stages
    assert stages == sorted(stages, key=lambda progress: progress.finished)
    # The file is the operator's own, and even so it says nothing of what sites answered.
    assert set(vars(stages[0])) == {"stage", "stages", "purpose", "answered", "participants", "finished", "absent"}


def test_who_refuses_is_out_and_its_words_are_kept(federation, folder):
    job = folder.read_job()
    strict = replace(POLICY, backbones=("resnet10t_gn",))
    with federation.site(A) as first, federation.site(B) as second, federation.site(C, policy=strict) as third:
        answers = {A: first.answer, B: second.answer, C: third.answer}
        run_folder(folder, InProcessCohort(sites=answers), report=lambda _: None)
    progress = progress_file.read_progress(folder.progress)
    assert [one.absent for one in progress] == [{C: "out"}] * len(progress)
    words = read_refusals(folder.progress.parent).sites[C].words
    assert words.startswith("refused (policy): job small: ")
    shown = typed("watch", folder.root, "--once")
    assert f"{C} missing since stage 1" in shown.output
    assert "refused (policy)" in shown.output
    assert job.digest[:16] in shown.output


def test_runs_tells_released_failed_and_interrupted_apart(federation, folder):
    assert [(run.state, run.done) for run in known_runs(folder)] == [("not begun", 0)]
    with federation.answers() as answers:
        cohort = Moody(answers)
        cohort.silent = {A, B, C}
        with pytest.raises(RoundFailed):
            run_folder(folder, cohort, report=lambda _: None)
        (run,) = known_runs(folder)
        assert (run.state, run.done, run.stages, run.name) == ("failed", 0, ROUNDS + 2, "small")
        assert "aggregation.minimum_sites is 2" in run.why
        cohort.silent = set()

        def killed(progress):
            cohort.dead = progress.stage == 2

        with pytest.raises(KeyboardInterrupt):
            run_folder(folder, cohort, report=killed)
        (run,) = known_runs(folder)
        assert (run.state, run.done) == ("interrupted", 2)
        began, cohort.dead = run.began, False
        run_folder(folder, cohort, report=lambda _: None)
    (run,) = known_runs(folder)
    assert (run.state, run.done, run.began, run.why) == ("released", ROUNDS + 2, began, "")
    folder.put_job(planned("1"))
    assert [run.state for run in known_runs(folder)] == ["not begun", "released"]
    listed = typed("runs", folder.root)
    first, second = listed.output.splitlines()[1:]
    assert "0 of 5" in first
    assert "not begun" in first
    assert "5 of 5" in second
    assert "40.00" in second
    assert "released" in second


def test_a_run_whose_process_was_killed_is_interrupted_until_somebody_says_that_it_was_stopped(federation, folder):
    with federation.answers() as answers:
        cohort, where = Moody(answers), folder.job_folder(folder.read_job())

        def look(progress):
            # While its process holds the ledger, it is on.
            assert known_runs(folder)[0].state == "on"
            if progress.stage == 2:
                record.append((where / "run.json").read_bytes())

        record = []
        run_folder(folder, cohort, report=look)
    ended = (where / "run.json").read_bytes()
    (where / "run.json").write_bytes(record[0])  # as a kill leaves it
    (run,) = known_runs(folder)
    assert (run.state, run.done) == ("interrupted", 2)
    assert "fedgrade resume" in run.why
    order_stop(where, "by `fedgrade stop`")
    assert known_runs(folder)[0].state == "stopped"
    assert read_record(where).why == "by `fedgrade stop`"
    # What the run itself said is not talked over.
    (where / "run.json").write_bytes(ended)
    assert read_record(where).outcome == "released"


def test_a_damaged_record_hides_no_other_run(federation, folder):
    with federation.answers() as answers:
        run_folder(folder, InProcessCohort(sites=answers), report=lambda _: None)
    first = folder.read_job()
    folder.put_job(planned("1"))
    other = folder.root / "jobs" / ("0" * 16)
    other.mkdir()
    (other / "run.json").write_bytes(b"\x00")
    # Without its record, a released job is known by its release.
    (folder.job_folder(first) / "run.json").unlink()
    known = {run.job[:16]: run.state for run in known_runs(folder)}
    assert known == {folder.read_job().digest[:16]: "not begun", first.digest[:16]: "released", "0" * 16: "unknown"}
    assert typed("runs", folder.root).exit_code == 0


def test_a_log_gets_lines_until_the_run_ends_and_the_status_of_its_outcome(federation, folder, monkeypatch):
    monkeypatch.setattr("server.watch_command._REFRESH_SECONDS", 0.02)
    begun, go_on = threading.Event(), threading.Event()

    def wait(_progress):
        begun.set()
        assert go_on.wait(60)

    def run():
        with federation.answers() as answers:
            run_folder(folder, InProcessCohort(sites=answers), report=wait)

    runner = threading.Thread(target=run)
    runner.start()
    assert begun.wait(60)
    threading.Timer(0.2, go_on.set).start()
    followed = typed("watch", folder.root)
    runner.join()
    assert followed.exit_code == 0, followed.output
    lines = followed.output.splitlines()
    assert lines[0] == "stage 1 of 5: centre, 3 of 3 sites"
    assert lines[-1].endswith(": released")
    assert "stage 5 of 5: evaluate, 3 of 3 sites" in lines


def test_a_run_that_comes_to_nothing_is_an_error_for_whoever_watches(federation, folder, monkeypatch):
    monkeypatch.setattr("server.watch_command._REFRESH_SECONDS", 0.02)
    begun, go_on = threading.Event(), threading.Event()

    def run():
        with federation.answers() as answers:
            cohort = Moody(answers)

            def wait(_progress):
                begun.set()
                assert go_on.wait(60)
                cohort.silent = {A, B, C}

            with pytest.raises(RoundFailed):
                run_folder(folder, cohort, report=wait)

    runner = threading.Thread(target=run)
    runner.start()
    assert begun.wait(60)
    threading.Timer(0.2, go_on.set).start()
    followed = typed("watch", folder.root)
    runner.join()
    assert isinstance(followed.exception, RunEnded)
    assert "failed: train round 0: 0 sites answered" in str(followed.exception)


def test_a_run_that_is_over_has_the_same_status_for_whoever_comes_late(federation, folder, monkeypatch):
    monkeypatch.setattr("server.watch_command._REFRESH_SECONDS", 0.02)
    not_begun = typed("watch", folder.root)
    assert isinstance(not_begun.exception, RunEnded)
    with federation.answers() as answers:
        cohort = Moody(answers)
        cohort.silent = {A, B, C}
        with pytest.raises(RoundFailed):
            run_folder(folder, cohort, report=lambda _: None)
        failed = typed("watch", folder.root)
        assert isinstance(failed.exception, RunEnded)
        assert ": failed: admission: 0 sites answered" in str(failed.exception)
        assert typed("watch", folder.root, "--once").exit_code == 0
        cohort.silent = set()
        run_folder(folder, cohort, report=lambda _: None)
    assert typed("watch", folder.root).exit_code == 0


def test_an_interrupted_run_is_watched_until_whoever_serves_takes_it_up(federation, folder, monkeypatch):
    monkeypatch.setattr("server.watch_command._REFRESH_SECONDS", 0.02)
    RunKeeper(folder.job_folder(planned()), planned())
    assert isinstance(typed("watch", folder.root).exception, RunEnded)
    with only_server(folder.root), federation.answers() as answers:
        run = threading.Timer(0.3, run_folder, (folder, InProcessCohort(sites=answers)), {"report": lambda _: None})
        run.start()
        followed = typed("watch", folder.root)
        run.join()
    assert followed.exit_code == 0, followed.output
    assert followed.output.splitlines()[-1].endswith(": released")


def test_resume_goes_where_the_partners_are(federation, tmp_path):
    nothing = typed("resume", federation.root)
    assert isinstance(nothing.exception, JobRefused)
    assert "no job here; start one with `fedgrade run`" in str(nothing.exception)
    settings = CoordinatorSettings(host="coordinator.example", public_port=1, admin_port=2, interface="127.0.0.1")
    create_coordinator(tmp_path / "coordinator", settings, now=NOW)
    elsewhere = typed("resume", tmp_path / "coordinator")
    assert isinstance(elsewhere.exception, NotServing)
    here = typed("resume", tmp_path / "coordinator", "--engine", "in-process")
    assert "on machines of their own; give --engine served" in str(here.exception)


def test_a_run_whose_process_is_gone_is_waited_for_where_somebody_serves_it(folder, monkeypatch):
    watched, view = _Watched(folder), big()
    gone = replace(view, run=replace(view.run, state="interrupted"))
    assert not watched.over(view)
    assert watched.over(gone)
    with only_server(folder.root):
        assert not watched.over(gone)
        assert watched.over(replace(view, run=replace(view.run, state="failed")))
        # Flower knows only after a minute that a run's process alone was killed.
        watched._gone_since -= 90.0
        assert not watched.over(gone)
        monkeypatch.setattr("server.watch_command._TAKEN_UP_SECONDS", -1.0)
        assert watched.over(gone)


def test_a_folder_without_a_job_says_so(federation):
    for command in ("runs", "watch"):
        said = typed(command, federation.root)
        assert said.exit_code == 0
        assert "no job was run here yet" in said.output


def test_whom_a_question_waits_for_is_told_from_when_it_was_first_asked(tmp_path):
    times = iter(NOW + timedelta(seconds=number) for number in range(9))
    file = AwaitedFile(tmp_path, clock=lambda: next(times))
    file.awaits({A, B, C})
    assert read_awaited(tmp_path) == Awaited(asked=utc_text(NOW), sites=(A, B, C))
    file._at -= 1.0
    file.awaits({C})  # also when it is asked once more
    assert read_awaited(tmp_path) == Awaited(asked=utc_text(NOW), sites=(C,))
    file.awaits({A, C})
    assert read_awaited(tmp_path).asked == utc_text(NOW + timedelta(seconds=1))


def test_who_is_waited_for_between_questions_is_told_and_named_in_the_end(federation, folder):
    watched = []
    with federation.answers() as answers:
        cohort = Moody(answers)
        cohort.silent = {B, C}
        with pytest.raises(RoundFailed, match=f"{B}, {C} did not answer"):
            run_folder(folder, cohort, report=lambda _: None, watch=watched.append)
    assert watched
    assert all(sites == [B, C] for sites in watched)
    assert f"{B}, {C} did not answer" in known_runs(folder)[0].why


def test_runs_says_the_whole_reason_however_narrow_the_terminal(folder):
    why = "train round 3: " + "; ".join(f"site-{number} did not answer" for number in range(12))
    RunKeeper(folder.job_folder(planned()), planned()).end("failed", why)
    said = CliRunner(env={"COLUMNS": "80"}).invoke(cli, ["runs", str(folder.root)])
    # Only the first of its lines begins with anything else.
    assert "".join(why.split()) in "".join(said.output.split())
    RunKeeper(folder.job_folder(planned()), planned()).end("failed", "x" * 2000)
    assert "x…" in "".join(typed("runs", folder.root).output.split())


def test_a_question_that_all_have_answered_waits_for_nobody_however_quick_they_were(tmp_path):
    file = AwaitedFile(tmp_path)
    for rest in ({A, B, C}, {C}, ()):
        file.awaits(rest)
    assert read_awaited(tmp_path).sites == ()
    file.awaits({A})
    assert read_awaited(tmp_path).sites == (A,)


def test_a_disk_that_takes_nothing_stops_no_run(tmp_path):
    gone = tmp_path / "gone"
    AwaitedFile(gone).awaits({A})
    RefusalsFile(gone).hears(A, "no")
    assert read_awaited(gone) == Awaited()
    assert read_refusals(gone) == Refusals()


def test_torn_lines_and_those_of_other_versions_are_passed_over(tmp_path):
    path = tmp_path / "progress.jsonl"
    assert progress_file.read_progress(path) == ()
    progress_file.append(path, stage(1))
    with path.open("ab") as file:
        file.write(b'{"stage": 2, "stages": 62, "purpose": "train", "answered": 5, "participants": 5}\n')
    progress_file.append(path, stage(2))
    with path.open("ab") as file:
        file.write(b'{"stage": 3, "sta')
    assert progress_file.read_progress(path) == (stage(1), stage(2))


def test_help_has_an_example():
    for command in ("runs", "watch", "resume"):
        assert f"Example: fedgrade {command} federation" in typed(command, "--help").output
