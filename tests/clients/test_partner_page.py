"""What docs/partner.md shows a partner is what works and what there is."""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from clients import settings
from fedgrade.data.manifest import read_manifest
from fedgrade.grading import GradeScale
from tests.clients.test_joining import content, home, partner  # noqa: F401 - fixtures

ROOT = Path(settings.__file__).parent.parent
PAGE = (ROOT / "docs" / "partner.md").read_text()
SCALE = GradeScale(name="page", labels=("intact", "defective"), critical=(), cost=((0.0, 1.0), (1.0, 0.0)))


def shown(language, mark):
    """The one block of the page in ``language`` that holds ``mark``."""
    (block,) = [each for each in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if mark in each]
    return block


def named():
    """The files that the page's table names."""
    rows = re.findall(
        r"^\| (`[^|]*) \| ", PAGE.partition("## Your files")[2].partition("## The manifest")[0], re.MULTILINE
    )
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_manifest_that_is_shown_is_one():
    manifest = read_manifest(shown("csv", "path,").encode(), SCALE)
    assert len(manifest.photos) == 3
    assert {photo.item for photo in manifest.photos} == {"cell-0001", "cell-0002"}


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="the page says that the command is for Linux")
def test_the_command_that_is_shown_writes_paths_and_digests(tmp_path):
    for name in ("a.png", "with space.png", "-dash.png", "batch/b.jpg"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    done = subprocess.run(
        ["bash", "-c", shown("sh", "sha256sum")],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.splitlines()) == sorted(
        f"{name},{hashlib.sha256(name.encode()).hexdigest()}"
        for name in ("a.png", "with space.png", "-dash.png", "batch/b.jpg")
    )


def test_every_file_of_a_site_is_named(partner):  # noqa: F811
    made = {str(path) for path in content(partner.parent)}
    written = yaml.safe_load((ROOT / "clients" / "site.example.yaml").read_text())
    later = {written[key] for key in ("roster", "ledger", "outbox", "cache", "backbones", "socket")}
    assert made | later | {"node_key.session", "ledger.jsonl.members", "ledger.jsonl.approvals"} <= named()
