"""Small disks that a test can fill: a tmpfs over a folder, with what was in it."""

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A mounted folder, which can be filled to the last byte and freed again."""

    def __init__(self, folder):
        self._ballast = folder / ".ballast"

    def fill(self):
        """Leave no room for a single byte."""
        with self._ballast.open("ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    continue

    def free(self):
        """Give the room back."""
        self._ballast.unlink()


@contextmanager
def small_disk(folder, *, mebibytes):
    """``folder`` on a disk of its own until the block ends; what it holds then stays."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk to fill")
    with tempfile.TemporaryDirectory() as aside:
        shutil.copytree(folder, aside, dirs_exist_ok=True, symlinks=True)
        options = f"size={mebibytes}m,mode=700"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if mounted.returncode != 0:
            pytest.skip(f"no disk to fill: {mounted.stderr.strip()}")
        try:
            shutil.copytree(aside, folder, dirs_exist_ok=True, symlinks=True)
            yield Disk(Path(folder))
            shutil.copytree(folder, aside, dirs_exist_ok=True, symlinks=True)
        finally:
            # Lazily: a process that is about to end may still hold a file.
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.copytree(aside, folder, dirs_exist_ok=True, symlinks=True)
