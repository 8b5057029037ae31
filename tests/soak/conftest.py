"""What the slow tests share: the file that their figures go to, and the features of public photos."""

import os
from pathlib import Path

import pytest

from fedgrade.errors import DataRefused
from server.configure import compose_job
from tests.benchmarks.features import public_features
from tests.benchmarks.quality import load_photos
from tests.benchmarks.sections import replace_section

CACHE = Path("runs/cache/bench")  # as make bench keeps it


@pytest.fixture
def publish():
    """``publish(section, lines)`` puts figures into the file that FEDGRADE_FIGURES names; make soak names one."""

    def write(section, lines):
        if path := os.environ.get("FEDGRADE_FIGURES"):
            replace_section(Path(path), section, "\n".join(lines), command="make soak")

    return write


@pytest.fixture(scope="session")
def demo_spec():
    # One site alone is attacked: whatever a secure sum adds is not there to help it.
    return compose_job(["experiment=demo", "privacy=local", "aggregation=mean"])


@pytest.fixture(scope="session")
def public_photos(demo_spec):
    """Every photo of the demo's package as features and grades; skips where the package is not installed."""
    try:
        return load_photos(public_features(demo_spec, cache=CACHE))
    except DataRefused as error:
        pytest.skip(f"no photos to attack: {error}")
