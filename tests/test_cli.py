"""The command line as people and scripts use it: exit codes, one line an error, and what is never imported."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fedgrade.cli import cli, main
from fedgrade.trust.identity import SigningKey
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from fedgrade.trust.records import DatasetOpened, PlanAccepted, Reserve
from tests.federation.small_federation import FIRST, NAMES, SmallFederation, ask, quick_noise, with_privacy

# What a compliance laptop does not have. Importing any of them from here on is an error.
BLOCKED = ("torch", "flwr", "opacus", "timm", "opendp", "onnxruntime", "hydra", "ray")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    federation = SmallFederation.create(tmp_path_factory.mktemp("cli") / "federation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
        federation.run_in_process(federation.job(with_privacy(rounds=1)))
    return federation


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    """An environment in which neither torch nor Flower nor anything like them can be imported."""
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": str(folder)}


def fedgrade(*arguments, environment=None, folder=None):
    """The installed command, in a process of its own."""
    command = [str(Path(sys.executable).parent / "fedgrade"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


def test_verify_needs_neither_torch_nor_flower_and_ends_well(whole, laptop):
    done = fedgrade("verify", whole.root, "--roster", whole.root / "roster.json", environment=laptop)
    assert done.returncode == 0, done.stderr
    assert "every signature, chain, charge and receipt holds" in done.stdout
    assert done.stderr == ""


def test_verify_names_the_first_broken_entry_in_one_line(whole, laptop):
    ledger = whole.ledger(NAMES[1])
    kept = ledger.read_bytes()
    position = kept.index(b"\n", kept.index(b"\n") + 1) + 40  # in the third line
    ledger.write_bytes(kept[:position] + bytes([kept[position] ^ 1]) + kept[position + 1 :])
    try:
        done = fedgrade("verify", whole.root, environment=laptop)
    finally:
        ledger.write_bytes(kept)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fedgrade: ledger {ledger}: entry 2: ")


def test_report_needs_neither_torch_nor_flower(whole, laptop):
    done = fedgrade("report", whole.root, environment=laptop)
    assert done.returncode == 0, done.stderr
    written = Path(done.stdout.strip())
    assert written.read_text(encoding="utf-8").startswith("<!")
    written.unlink()


def test_commands_that_are_not_installed_say_what_they_need(laptop, tmp_path):
    for command in (["run", "privacy.target_epsilon=2"], ["site", "up", "site.yaml"]):
        done = fedgrade(*command, environment=laptop, folder=tmp_path)
        assert done.returncode == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert f"`fedgrade {command[0]}` needs " in line
        assert "pip install 'fedgrade[demo]'" in line
    listed = fedgrade("--help", environment=laptop)
    assert listed.returncode == 0
    assert "Not installed here" in listed.stdout
    assert list(tmp_path.iterdir()) == []


def _commands(group, path=()):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))


def test_every_command_has_help_with_an_example_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = list(_commands(cli))
    assert {("demo",), ("run",), ("verify",), ("report",), ("grade",), ("site", "up"), ("keys", "new")} <= set(commands)
    for command in [(), *commands]:
        shown = CliRunner().invoke(cli, [*command, "--help"])
        assert shown.exit_code == 0, (command, shown.output)
        assert "Example: fedgrade" in shown.output, command
    assert list(tmp_path.iterdir()) == []


def in_process(capsys, monkeypatch, *arguments):
    """(exit code, standard output, standard error) of the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["fedgrade", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as left:
        code = left.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_an_unknown_command_and_an_unknown_option_say_so(capsys, monkeypatch):
    for arguments, said in ((["trian"], "No such command 'trian'"), (["verify", "--fast", "."], "No such option")):
        code, out, err = in_process(capsys, monkeypatch, *arguments)
        assert code == 2
        assert said in err
        assert out == ""


def test_a_folder_that_is_missing_or_no_federation_is_one_line(capsys, monkeypatch, tmp_path):
    code, _, err = in_process(capsys, monkeypatch, "verify", tmp_path / "nothing")
    assert code == 2
    assert "does not exist" in err
    code, out, err = in_process(capsys, monkeypatch, "verify", tmp_path)
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        f"fedgrade: roster {tmp_path / 'roster.json'}: cannot be read (No such file or directory)"
    ]


def test_a_new_key_is_private_and_never_overwritten(capsys, monkeypatch, tmp_path):
    path = tmp_path / "key.pem"
    code, public, _ = in_process(capsys, monkeypatch, "keys", "new", path)
    assert code == 0
    assert path.stat().st_mode & 0o077 == 0
    raw = path.read_bytes()
    code, out, err = in_process(capsys, monkeypatch, "keys", "new", path)
    assert (code, out, path.read_bytes()) == (1, "", raw)
    assert err.splitlines() == [f"fedgrade: key {path}: exists already; a key is never overwritten"]
    code, shown, _ = in_process(capsys, monkeypatch, "keys", "show", path)
    assert (code, shown) == (0, public)
    assert SigningKey.load(path).public.hexadecimal == public.strip()


def test_a_key_in_a_folder_that_is_not_there_is_one_line(capsys, monkeypatch, tmp_path):
    code, out, err = in_process(capsys, monkeypatch, "keys", "new", tmp_path / "nowhere" / "key.pem")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert "nowhere/key.pem" in line
    assert "No such file or directory" in line


def test_the_roster_of_someone_else_is_not_believed(whole, capsys, monkeypatch, tmp_path):
    other = SmallFederation.create(tmp_path / "other")
    code, out, err = in_process(capsys, monkeypatch, "verify", whole.root, "--roster", other.root / "roster.json")
    assert (code, out) == (1, "")
    assert "signed by key" in err


def test_a_participant_whose_ledger_is_not_there_is_named(whole, capsys, monkeypatch):
    ledger = whole.ledger(NAMES[2])
    ledger.rename(ledger.with_name("elsewhere"))
    try:
        code, out, err = in_process(capsys, monkeypatch, "verify", whole.root)
        partial, shown, _ = in_process(capsys, monkeypatch, "verify", whole.root, "--partial")
    finally:
        ledger.with_name("elsewhere").rename(ledger)
    assert (code, partial) == (1, 0)
    assert "no ledger of recycler-c" in err
    for said in (out, shown):
        assert "recycler-c took part, and the ledgers are not here" in said
        assert "every signature" not in said


def test_a_release_without_a_federation_around_it_asks_for_a_roster(capsys, monkeypatch, tmp_path):
    code, _, err = in_process(capsys, monkeypatch, "grade", "--model", tmp_path, "x.png")
    assert code == 1
    assert err.splitlines() == [f"fedgrade: release {tmp_path}: no federation's roster lies above it; give --roster"]


def test_names_in_a_partner_s_ledger_cannot_steer_the_terminal(tmp_path, capsys, monkeypatch):
    """A lineage is whatever its partner wrote: escape codes, line breaks, the brackets that rich takes for style."""
    federation = SmallFederation.create(tmp_path / "federation")
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
    with federation.site() as site:
        job = federation.job(with_privacy(rounds=1))
        site.answer(federation.admission(job))
        site.answer(federation.question(job, ask("centre")))
    key, path = federation.site_keys[NAMES[0]], federation.ledger(NAMES[0])
    bodies = [entry.body for entry in read_ledger(path, key=key.public)]
    path.unlink()
    evil = "\x1b[2J[/bold]\nfedgrade: all is well"
    with LedgerWriter.open(path, key=key, observe=lambda _: None) as writer:
        for body in bodies:
            if isinstance(body, DatasetOpened):
                writer.append(replace(body, lineage=evil), now=FIRST)
            elif isinstance(body, PlanAccepted | Reserve):
                renamed = tuple(replace(one, lineage=evil) for one in body.accounts)
                writer.append(replace(body, accounts=renamed), now=FIRST)
            else:
                writer.append(body, now=FIRST)
    log = federation.root / "coordinator" / "ledger.jsonl"
    with LedgerWriter.open(log, key=federation.coordinator_key, observe=lambda _: None) as writer:
        writer.start(owner="coordinator", role="coordinator", now=FIRST)
    monkeypatch.setenv("COLUMNS", "300")
    code, out, err = in_process(capsys, monkeypatch, "verify", federation.root)
    assert code == 0, err
    assert "\x1b[2J" not in out
    assert "[/bold]?fedgrade: all is well" in out
    assert not any(line.startswith("fedgrade: all is well") for line in out.splitlines())
