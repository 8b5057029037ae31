"""Folders to report on, written once a session: verification does not change them."""

import importlib.util
import sys
from pathlib import Path

import pytest


def _helper():
    name = "federation_folder"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def federations():
    """The module that writes federations."""
    return _helper()


@pytest.fixture(scope="session")
def troubled_folder(federations, tmp_path_factory):
    """Five sites, twenty rounds: one site silent once, one attempt aborted, one reply lost."""
    folder = tmp_path_factory.mktemp("federation") / "troubled"
    story = federations.Story(
        silent=frozenset({("limerick", 7)}),
        aborted=frozenset({("gdansk", 4)}),
        repeated=frozenset({("turin", 9)}),
    )
    federations.write_federation(folder, story)
    return folder
