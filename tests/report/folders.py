"""Folders to report on, written once a session, for reports and for pages: verification does not change them."""

import pytest

from tests.report import federation_folder


@pytest.fixture(scope="session")
def federations():
    """The module that writes federations."""
    return federation_folder


@pytest.fixture(scope="session")
def troubled_folder(tmp_path_factory):
    """Five sites, twenty rounds: one site silent once, one attempt aborted, one reply lost."""
    folder = tmp_path_factory.mktemp("federation") / "troubled"
    story = federation_folder.Story(
        silent=frozenset({("limerick", 7)}),
        aborted=frozenset({("gdansk", 4)}),
        repeated=frozenset({("turin", 9)}),
    )
    federation_folder.write_federation(folder, story)
    return folder
