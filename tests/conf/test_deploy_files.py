"""What operators copy from docs/deploy/ fits what is installed."""

import re
import shutil
import subprocess

import click
import pytest

from fedgrade.cli import cli
from server.configure import CONF

DEPLOY = CONF.parent / "docs" / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def known(words):
    """Whether ``fedgrade`` takes the command that ``words`` begin with."""
    command, context = cli, click.Context(cli)
    for word in words:
        if not isinstance(command, click.Group):
            return True
        command = command.get_command(context, word)
        if command is None:
            return False
    return True


# The doors import flwr, whose typer uses what this click has deprecated.
@pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")
@pytest.mark.parametrize("path", [*UNITS, DEPLOY / "Containerfile"], ids=lambda path: path.name)
def test_every_command_that_is_named_exists(path):
    named = re.findall(r"(?:bin/|: +|/srv/\S+ |/srv/c )fedgrade ((?:[a-z]+ ?)+)", path.read_text())
    assert named
    for command in named:
        assert known(command.split()), command


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


def test_the_image_is_made_of_what_there_is():
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE)
    for name in " ".join(copied).split():
        assert (CONF.parent / name).exists(), name
