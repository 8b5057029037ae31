"""``fedgrade demo`` and ``run`` as typed, over the demo's real photos, a few of each recycler."""

import os
import sys

import pytest

from fedgrade.cli import main
from fedgrade.data import elpv
from fedgrade.federation.verification import verify_federation
from server.commands import run_lock
from tests.server.few_photos import POOLING, cache_beside, few

QUICK = ("privacy.rounds=2", "data.minimum_items=10", POOLING)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where everything is written."""
    folder = tmp_path_factory.mktemp("runs")
    cache_beside(folder, tmp_path_factory)
    return folder


@pytest.fixture
def typed(capsys, monkeypatch):
    """What the command line answers: exit code, standard output, standard error."""
    monkeypatch.setattr(elpv, "site_manifests", few(elpv.site_manifests, recyclers=5))
    monkeypatch.setenv("COLUMNS", "300")

    def type_in(*arguments):
        monkeypatch.setattr(sys, "argv", ["bin/fedgrade", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return type_in


def refused(typed, *arguments):
    code, _, err = typed(*arguments)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("fedgrade: ")]
    return line


def test_a_demo_trains_reports_and_leaves_a_folder_that_verifies(typed, runs):
    code, out, err = typed("demo", "--folder", runs, "--engine", "in-process", *QUICK)
    assert code == 0, err
    assert elpv.LICENCE in out
    assert elpv.CITATION.split(".")[0] in out
    for said in (
        "quadratic weighted kappa",
        "accuracy",
        "misses of defective",
        "epsilon per item at delta 1e-05",
        "Next:",
    ):
        assert said in out
    root = runs / "demo"
    assert root.is_symlink()
    proof = verify_federation(root)
    (job,) = proof.jobs.values()
    assert len(job.job.participants) == 5
    assert f"{proof.entries} ledger entries verified" in out
    (release,) = root.glob("jobs/*/release")
    (report,) = root.rglob("*.html")
    assert str(release) in out
    assert str(report) in out
    assert f"bin/fedgrade verify {root}" in out
    for key in root.glob("**/*.pem"):
        assert key.stat().st_mode & 0o077 == 0, key


def test_the_released_model_grades_photos_and_refuses_what_is_no_photo(typed, runs, tmp_path):
    (release,), photos = (runs / "demo").glob("jobs/*/release"), elpv.package_photos()
    grade = ("grade", "--model", release, "--cache", runs / "cache" / "backbones")
    odd = tmp_path / " [bold]cell.png\t"
    odd.write_bytes((photos / "cell0002.png").read_bytes())
    code, out, err = typed(*grade, photos / "cell0001.png", odd)
    assert code == 0, err
    assert "[bold]cell.png" in out
    (row,) = [line.split() for line in out.splitlines() if "cell0001.png" in line]
    assert row[-2].endswith("%")
    assert float(row[-1]) >= 0
    torn = tmp_path / "torn.png"
    torn.write_bytes(odd.read_bytes()[:500])
    assert "torn.png" in refused(typed, *grade, torn)
    assert "cannot be read" in refused(typed, *grade, tmp_path / "nothing.png")
    stranger = tmp_path / "roster.json"
    stranger.write_bytes((runs / "demo" / "roster.json").read_bytes().replace(b"a", b"b"))
    assert "fedgrade: " in refused(typed, *grade, "--roster", stranger, odd)


def test_a_second_demo_is_a_new_federation_and_starts_from_the_caches(typed, runs):
    before = {path: path.stat().st_mtime_ns for path in (runs / "cache").glob("**/*.*") if path.suffix != ".lock"}
    keys = {path.read_bytes() for path in runs.glob("demo-*/coordinator/key.pem")}
    code, _, err = typed("demo", "--folder", runs, "--engine", "in-process", *QUICK)
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (runs / "demo" / "coordinator" / "key.pem").read_bytes() not in keys


def test_runs_over_one_federation_add_up_until_the_recyclers_refuse(typed, runs):
    run = ("run", "--federation", runs / "federation", "--engine", "in-process", *QUICK)
    for wish in ("privacy.target_epsilon=4", "privacy.target_epsilon=5"):
        code, _, err = typed(*run, wish)
        assert code == 0, err
    line = refused(typed, *run, "privacy.target_epsilon=6")
    assert "refused (budget)" in line
    assert "the partner's ceiling is 8.00" in line
    assert len(verify_federation(runs / "federation").jobs) == 2
    code, out, err = typed("run", "--federation", runs / "federation", "--engine", "in-process", *QUICK, "--resume")
    assert code == 1
    assert "refused (budget)" in err
    assert "release" not in out


def test_shares_of_noise_without_a_secure_sum_are_refused_before_anything_is_made(typed, runs):
    folder = runs / "distributed"
    line = refused(typed, "run", "--federation", folder, "--engine", "in-process", *QUICK, "privacy=distributed")
    assert "aggregation.method: 'mean' would show the coordinator each upload" in line
    assert "choose aggregation=secure_sum" in line
    assert not folder.exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("privacy.epsilon=2", "privacy.epsilon"),
        ("privacy.target_epsilon=-1", "privacy.target_epsilon"),
        ("privacy.target_epsilon=many", "target_epsilon"),
        ("privacy=none", "privacy"),
        ("privacy.noise=0", "privacy.noise"),
        ("aggregation.minimum_sites=6", "aggregation.minimum_sites"),
        ("name=../../etc", "name"),
        ("privacy.delta=0.5", "privacy.delta"),
    ],
)
def test_a_wish_that_cannot_be_is_one_line_that_names_it_and_starts_nothing(typed, tmp_path, override, said):
    line = refused(typed, "run", "--federation", tmp_path / "federation", "--engine", "in-process", override)
    assert said in line
    assert not (tmp_path / "federation" / "jobs").exists()


def test_an_impossible_plan_leaves_no_federation_behind(typed, tmp_path):
    refused(typed, "run", "--federation", tmp_path / "federation", "aggregation.minimum_sites=6")
    refused(typed, "demo", "--folder", tmp_path, "aggregation.minimum_sites=6")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_one_folder_is_refused_and_leaves_the_first_one_s_job(typed, runs):
    root = (runs / "demo").resolve()
    before = (root / "coordinator" / "job.json").read_bytes()
    with run_lock(root):
        line = refused(typed, "run", "--federation", root, "--engine", "in-process", *QUICK)
        assert f"process {os.getpid()} runs a job here; wait" in line
        assert "runs a job here" in refused(typed, "run", "--federation", root, "--resume")
    assert (root / "coordinator" / "job.json").read_bytes() == before


def test_a_demo_that_fails_leaves_the_link_where_it_was(typed, runs):
    before = (runs / "demo").resolve()
    refused(
        typed, "demo", "--folder", runs, "--engine", "in-process", *QUICK, "privacy=distributed", "aggregation=mean"
    )
    assert (runs / "demo").resolve() == before


def test_nothing_to_resume_is_one_line(typed, tmp_path):
    line = refused(typed, "run", "--federation", tmp_path / "federation", "--resume")
    assert "no job here" in line or "cannot be read" in line
    assert list(tmp_path.glob("federation/*")) == []


def test_the_groups_are_listed_without_a_federation(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = typed("run", "--groups")
    assert code == 0
    for name in ("local_sgd", "distributed", "pilot", "solar_cells"):
        assert name in out
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_does_not_exist_is_refused(typed):
    code, _, err = typed("run", "--engine", "cloud")
    assert code == 2
    assert "'cloud' is not one of" in err
