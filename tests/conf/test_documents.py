"""What the documents point at exists: files, tests, commands, options of the configuration."""

import re
from pathlib import Path

import click
import pytest

from fedgrade.cli import cli
from server.configure import CONF, compose_job

ROOT = CONF.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
FOLDERS = ("fedgrade", "clients", "server", "conf", "tests", "docs", "benchmarks")


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_file_that_is_named_exists(path):
    for named in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", path.read_text()):
        # An example of a file that the reader is to add.
        assert (ROOT / named).exists() or named == "conf/grading/pumps.yaml", named


# The doors import flwr, whose typer uses what this click has deprecated.
@pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")
@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_command_that_is_named_exists(path):
    context = click.Context(cli)
    for verb, noun in re.findall(r"\bfedgrade (?!-)([a-z]+)(?: ([a-z]+))?(?= |`|$)", code_of(path)):
        command = cli.get_command(context, verb)
        assert command is not None, verb
        if isinstance(command, click.Group) and noun:
            assert command.get_command(context, noun) is not None, f"{verb} {noun}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_job_that_is_shown_composes(path):
    for line in re.findall(r"^.*\bfedgrade (?:run|demo) (.*)$", code_of(path), flags=re.MULTILINE):
        overrides = [word for word in line.partition("#")[0].split() if "=" in word and not word.startswith("-")]
        compose_job([override.strip("`") for override in overrides])


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_make_target_that_is_named_exists(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", code_of(path), flags=re.MULTILINE)) <= targets


def test_the_tree_in_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text()
    tree = text.partition("## The tree")[2].partition("```\n")[2].partition("```")[0]
    base = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        base = base if line.startswith(" ") else ROOT
        assert (base / name).exists(), name
        if not line.startswith(" ") and name.endswith("/"):
            base = ROOT / name
    rooms = {path.name for path in (ROOT / "fedgrade").iterdir() if not path.name.startswith("_")}
    assert {name for name in rooms if f"  {name.removesuffix('/')}" not in tree} == set()


def code_of(path: Path) -> str:
    """Code blocks and inline code of a document, a line each."""
    text = path.read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))])
