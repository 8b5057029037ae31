"""`kill -9` at the steps that matter most, in a real deployment: same model, nothing lost, nothing paid for twice.

One job in which everybody dies once. Every pair of who dies and when, each in a job of its own:
tests/soak/test_faults.py.
"""

import threading
import time
from contextlib import ExitStack

import pytest

from server.progress_file import read_progress
from tests.faults.bad_link import NEAR
from tests.faults.links import bad_link
from tests.faults.policies import plain
from tests.faults.served import Served, eventually
from tests.faults.steps import RUN, SUPERLINK
from tests.federation.small_federation import NAMES, SmallFederation, calibrate_once, zeros

pytestmark = pytest.mark.flower
ALICE, BOB, CAROL = NAMES
BAD = {"loss": 0.05, "delay": 0.05, "jitter": 0.03}
CUT_SECONDS = 3.0


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    """A wire between coordinator and partners; None where this user cannot have one."""
    with ExitStack() as stack:
        try:
            link = stack.enter_context(bad_link(tmp_path_factory.mktemp("wire")))
        except pytest.skip.Exception:
            link = None
        yield link


@pytest.fixture(scope="module")
def served(tmp_path_factory, link):
    settings = {} if link is None else {"host": NEAR, "where": link.where}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.job.calibrate", calibrate_once)
        with Served(tmp_path_factory.mktemp("faults"), **settings) as served:
            yield served


@pytest.fixture
def undisturbed(tmp_path, monkeypatch):
    """Digest of the weights where nobody dies, from one process."""
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", zeros)
    federation = SmallFederation.create(tmp_path / "undisturbed")
    return federation.run_in_process(federation.job(plain(len(NAMES)))).release.weights_digest


def test_sites_and_superlink_are_killed_in_one_job_and_the_model_and_the_charges_are_what_they_would_be(
    served, undisturbed
):
    job = served.federation.job(plain(len(NAMES)))
    wires = [
        served.kill_at(ALICE, "before the charge", place=("train", 0)),
        served.kill_at(BOB, "charged", place=("train", 0)),
        served.kill_at(CAROL, "reply kept, not sent", place=("train", 0)),
        # The run goes with it. After the checkpoint and before the ledger.
        served.kill_at(RUN, "checkpoint", victim=SUPERLINK, place=("train", 1)),
    ]
    said = served.finish(job)
    assert all(wire.exists() for wire in wires), said
    served.require_at_rest()
    outcome = served.outcome(job, said)
    assert (outcome.weights, outcome.unpaid) == (undisturbed, 0), said
    # A charge whose reply was not kept yet is lost with the process, and never taken back: the next attempt pays again.
    assert outcome.twice == {BOB: 1}
    # Nobody had to do anything: nodes are let in again, and the run is taken up where it stood.
    assert said == ()


def test_a_site_whose_clock_is_ten_minutes_off_is_not_heard_and_both_sides_say_why(served):
    def charges():
        return {site: len(served.federation.charges(site)) for site in NAMES}

    def said(log, words, *, after):
        eventually(lambda: words in served.log(log)[after:], what=lambda: served.log(log)[after:])

    before, read = charges(), len(served.log(f"site-{CAROL}"))
    served.set_clock(CAROL, 600)
    said(f"site-{CAROL}", "set the clock that is wrong", after=read)
    said("superlink", "s ahead of the SuperLink's clock", after=0)
    read = len(served.log(f"site-{CAROL}"))
    served.set_clock(CAROL, 0)
    said(f"site-{CAROL}", "link online", after=read)
    assert charges() == before


def test_a_network_that_loses_delays_and_is_cut_costs_time_and_nothing_else(served, link, undisturbed):
    if link is None:
        pytest.skip("no network of one's own without root and TUN")
    job = served.federation.job(plain(len(NAMES)), nonce="bad network")

    def cut():
        eventually(lambda: read_progress(served.folder.progress), what="no stage is done")
        link.be(**BAD, cut=True)
        time.sleep(CUT_SECONDS)
        link.be(**BAD)

    served.put(job)
    cutting = threading.Thread(target=cut)
    link.be(**BAD)
    cutting.start()
    said = served.finish(job, deadline_seconds=120.0)
    cutting.join()
    link.be()
    outcome = served.outcome(job, said)
    assert (outcome.weights, outcome.unpaid, outcome.twice, said) == (undisturbed, 0, {}, ())
