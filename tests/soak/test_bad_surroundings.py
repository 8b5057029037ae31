"""Networks, disks and clocks that fail under a deployment: a clean refusal, nothing half-written, then on it goes."""

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedgrade.errors import FedgradeError
from tests.faults.bad_link import NEAR
from tests.faults.disks import small_disk
from tests.faults.links import bad_link
from tests.faults.policies import plain
from tests.faults.served import Served, eventually
from tests.federation.small_federation import NAMES, SmallFederation, calibrate_once, zeros

pytestmark = [pytest.mark.slow, pytest.mark.flower]
SPEC = plain(len(NAMES))
CAROL = NAMES[2]
BAD = {"loss": 0.1, "delay": 0.2, "jitter": 0.1}
CUT_SECONDS = 20.0
OFF_CLOCK = Path(__file__).parents[1] / "faults" / "off_clock"


@pytest.fixture(scope="module", autouse=True)
def _solved_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.job.calibrate", calibrate_once)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Digest of the weights where all is well, from one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", zeros)
        federation = SmallFederation.create(tmp_path_factory.mktemp("undisturbed") / "federation")
        return federation.run_in_process(federation.job(SPEC)).release.weights_digest


def require_undisturbed(served, job, said, undisturbed):
    outcome = served.outcome(job, said)
    assert (outcome.weights, outcome.twice, outcome.unpaid) == (undisturbed, {}, 0), said


def stage_done(served):
    """Return when the job that is on has got through its first stage."""
    path = served.folder.progress
    eventually(lambda: path.exists() and path.read_text(), what="no stage is done", seconds=120.0)


def test_a_network_that_loses_delays_and_is_cut_in_mid_round_costs_time_and_nothing_else(tmp_path, undisturbed):
    def cut():
        stage_done(served)
        link.be(**BAD, cut=True)
        time.sleep(CUT_SECONDS)
        link.be(**BAD)

    with bad_link(tmp_path) as link, Served(tmp_path, host=NEAR, where=link.where) as served:
        job = served.federation.job(SPEC)
        link.be(**BAD)
        cutting = threading.Thread(target=cut)
        cutting.start()
        said = served.finish(job, deadline_seconds=180.0)
        cutting.join()
        link.be()
        assert said == ()
        require_undisturbed(served, job, said, undisturbed)
        served.require_at_rest()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("surroundings")) as served:
        yield served


def refused(served):
    """What the operator is told of the job that is on, which does not end in a model."""
    with pytest.raises(FedgradeError) as told:
        served.once(deadline_seconds=12.0)
    return str(told.value)


def charged(served, job):
    return {site: sum(charge.job == job.digest for charge in served.federation.charges(site)) for site in NAMES}


def test_a_site_whose_disk_is_full_charges_nothing_and_goes_on_when_there_is_room(served, undisturbed):
    job = served.federation.job(SPEC, nonce="full site")
    folder = served.federation.folder(CAROL)
    served.close_house()
    with small_disk(folder, mebibytes=8) as disk:
        served.open_house()
        served.wait_online()
        served.put(job)
        disk.fill()
        before = served.federation.ledger(CAROL).read_bytes() if served.federation.ledger(CAROL).exists() else b""
        told = refused(served)
        assert f"{CAROL} refused (ledger)" in told, told
        assert "No space left on device" in served.log(f"site-{CAROL}")
        assert served.federation.ledger(CAROL).read_bytes() == before
        disk.free()
        said = served.finish(job)
        require_undisturbed(served, job, said, undisturbed)
        assert not list(folder.rglob("*.part"))
        served.close_house()
    served.open_house()
    served.wait_online()


@pytest.mark.parametrize("full", ["coordinator", "jobs"])
def test_a_coordinator_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(served, undisturbed, full):
    job = served.federation.job(SPEC, nonce=f"full {full}")
    (served.root / full).mkdir(exist_ok=True)
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(served.root / full, mebibytes=8))
        served.put(job)
        filling = threading.Thread(target=lambda: (stage_done(served), disk.fill()))
        filling.start()
        told = refused(served)
        filling.join()
        assert "No space left on device" in told, told
        assert 0 < len(served.folder.progress.read_text().splitlines()) < job.plan.rounds + 2
        disk.free()
        said = served.finish(job)
        require_undisturbed(served, job, said, undisturbed)
        assert not list((served.root / full).rglob("*.part"))
        served.stop_serving()
    served.keep_serving()
    served.wait_online()


@pytest.mark.parametrize("seconds", [600, -600])
def test_a_coordinator_whose_clock_is_ten_minutes_off_hears_nobody_and_both_sides_say_why(served, seconds):
    job = served.federation.job(SPEC, nonce=f"coordinator {seconds}")
    served.stop_serving()
    served.keep_serving(PYTHONPATH=str(OFF_CLOCK), FEDGRADE_SHIFT=str(seconds))
    heard = {site: len(served.log(f"site-{site}")) for site in NAMES}
    for site in NAMES:
        eventually(lambda site=site: "set the clock" in served.log(f"site-{site}")[heard[site] :], what=f"{site}")
    eventually(lambda: "set the clock" in served.log("superlink"), what="superlink")
    assert served.online() == set()
    served.put(job)
    refused(served)
    assert charged(served, job) == dict.fromkeys(NAMES, 0)
    served.stop_serving()
    served.keep_serving()
    served.wait_online()
