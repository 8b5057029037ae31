"""A revocation in mid-round ends the wait for its site within two seconds: by the order of events, not by a clock."""

import logging

import pytest

from fedgrade.federation import exchange
from server import coordinate, grid_cohort, serving
from server.coordinator_folder import CoordinatorFolder
from server.enrolment import create_coordinator, enrol, enrolled_nodes, revoke
from server.grid_cohort import GridCohort
from server.nodes_file import write_nodes
from tests.server.test_grid_cohort import MemoryGrid, echo, silent
from tests.server.test_leaving import LATER, NORTH, NOW, SETTINGS, SOUTH, wish

WITHIN_SECONDS = 2.0
# So long that, if anything but the revocation ended the wait, the deadline would have.
DEADLINE_SECONDS = 60.0
GONE, STAYS = "north", "south"


@pytest.fixture
def folder(tmp_path):
    """A coordinator that enrolled north and south, whose nodes the SuperLink knows."""
    folder = CoordinatorFolder(root=tmp_path / "coordinator")
    create_coordinator(folder.root, SETTINGS, now=NOW)
    for number, (site, key) in enumerate(((GONE, NORTH), (STAYS, SOUTH)), start=1):
        enrol(folder, wish(site, key, number=number), approve=lambda _: None, now=NOW)
    write_nodes(folder.root, {GONE: 100, STAYS: 101})
    return folder


def test_a_question_that_only_a_revoked_site_still_owes_is_closed_by_its_revocation(folder, caplog):
    happened = []

    def watch(awaited):
        happened.append(sorted(awaited))
        if happened.count([GONE]) == 1 and happened[-1] == [GONE]:
            revoke(folder, GONE, reason="trial of a revocation", now=LATER)

    # A poll as long as the deadline: only the longest pause makes anybody look before.
    cohort = GridCohort(
        MemoryGrid({100: silent, 101: echo}), enrolled_nodes(folder.root), DEADLINE_SECONDS, watch=watch
    )
    with caplog.at_level(logging.WARNING, logger="server.grid_cohort"):
        replies = cohort.ask({GONE: b"question", STAYS: b"question"}, deadline_seconds=DEADLINE_SECONDS)
    assert replies == {STAYS: b"question!"}
    # Both were asked, one answered, the other was revoked while it was awaited alone, and then nobody was awaited.
    assert happened == [[GONE, STAYS], [GONE], []]
    assert [record.getMessage() for record in caplog.records] == [f"site {GONE}: was revoked, and is not awaited"]


def test_a_run_that_waits_for_a_site_learns_of_its_revocation_from_the_book(folder):
    revoked = coordinate._Revoked(folder)
    assert revoked() == set()
    revoke(folder, GONE, reason="trial of a revocation", now=LATER)
    assert revoked() == {GONE}
    assert coordinate._Revoked(CoordinatorFolder(root=folder.root / "none"))() == set()


def test_the_pauses_between_looks_leave_a_revocation_no_more_than_two_seconds():
    # Of the run, which stops waiting, and of `serve`, which has the SuperLink strike the node off.
    longest, follower = grid_cohort._LONGEST_PAUSE_SECONDS, serving._LOOK_SECONDS
    assert max(longest, exchange._LOOK_SECONDS) + follower <= WITHIN_SECONDS
