"""One job, three engines, one result: in process, in Flower's simulation, and deployed over TLS with real processes.

Noise is switched off, because noise that nobody can seed has no second run to be compared with. Only a test's own
program can do that: see noiseless_site.py.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fedgrade.data import elpv
from fedgrade.federation.release import open_release
from fedgrade.federation.verification import verify_federation
from fedgrade.job import plan_job
from server.configure import compose_job
from server.deployment import Deployment
from server.local_federation import LocalFederation, Terms, create_local_federation
from tests.server.few_photos import POOLING, cache_beside, few

pytestmark = pytest.mark.flower

NOISELESS = str(Path(__file__).with_name("noiseless_site.py"))
RECYCLERS = 3
OVERRIDES = ("privacy.rounds=3", "data.minimum_items=10", POOLING)
SPEC = compose_job(OVERRIDES)
# The same without noise; whatever the masks leave behind would show.
MASKED = replace(
    compose_job(["privacy=distributed", "aggregation=secure_sum", "aggregation.minimum_sites=3", *OVERRIDES]),
    name="masked",
)
TERMS = Terms(modes=("local", "distributed"), epsilon_limit=8.0, epsilon_per_job=8.0)
# Ray wants the main thread of a process of its own.
SIMULATION = """
import sys
from pathlib import Path
import numpy as np
from fedgrade.federation import releases
from server.engines import run_engine
from server.local_federation import LocalFederation

class Nobody:
    def note(self, line): pass
    def features(self, percent): pass
    def watch(self, progress): pass

releases.discrete_gaussian = lambda size, *, scale: np.zeros(size, dtype=np.int64)
if __name__ == "__main__":
    run_engine(sys.argv[1], LocalFederation(root=Path(sys.argv[2])), Nobody())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    cache_beside(folder, tmp_path_factory)
    return folder


def created(folder, name):
    """A federation of three recyclers with a few real photos each; features are cached across all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elpv, "site_manifests", few(elpv.site_manifests, recyclers=RECYCLERS))
        federation = create_local_federation(
            folder / name, scale=SPEC.grading, data=SPEC.data, terms=TERMS, cache=folder / "cache"
        )
    for site in federation.sites():
        path = federation.site_file(site)
        settings = yaml.safe_load(path.read_bytes())
        path.write_text(yaml.safe_dump({**settings, "device": "cpu"}, sort_keys=False))
    return federation


def with_job(federation, spec=SPEC):
    """``federation`` with the one job that all engines run; its digest is the same everywhere."""
    job = plan_job(spec, declared_items=federation.declared_items(), nonce="the same everywhere")
    federation.coordinator.put_job(job)
    return job


def released(federation, job):
    proof = verify_federation(federation.root, roster=federation.coordinator.read_roster())
    assert len(proof.jobs[job.digest].rounds) == SPEC.privacy.rounds + 2
    folder = federation.coordinator.job_folder(job) / "release"
    return open_release(folder, signed_by=federation.coordinator.read_roster().coordinator).release


def run_by_program(engine, folder, spec=SPEC):
    federation = created(folder, engine)
    job = with_job(federation, spec)
    command = [sys.executable, "-c", SIMULATION, engine, str(federation.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return job, released(federation, job)


@pytest.fixture(scope="module")
def in_process(folder):
    """The job in one process: what the other engines are compared with. Fills the caches."""
    return run_by_program("in-process", folder)


@pytest.fixture(scope="module")
def deployment(folder, in_process):
    """The recyclers' own processes, up and online, their noise switched off."""
    del in_process  # its caches are used
    federation = created(folder, "deployed")
    with Deployment(federation.root) as deployment:
        federation.connect(deployment.address, deployment.authority)
        for site in federation.sites():
            deployment.enrol(site, federation.node_key(site))
            command = [sys.executable, NOISELESS, "site", "up", str(federation.site_file(site))]
            deployment.start_site(site, command)
        deployment.wait_online(timeout_seconds=300.0)
        yield federation, deployment


# Ray alone takes half a minute here; that the simulation carries the same bytes, test_simulate.py says every time.
@pytest.mark.slow
def test_a_secure_sum_in_flower_s_simulation_engine_ends_with_the_same_weights_to_the_last_bit(folder, in_process):
    _, reference = in_process
    _, simulated = run_by_program("simulated", folder, MASKED)
    assert simulated.weights_digest == reference.weights_digest
    assert simulated.counts == reference.counts


# The secure sum below goes the same way, and further.
@pytest.mark.slow
def test_a_deployment_over_tls_ends_with_the_same_weights(deployment, in_process):
    federation, running = deployment
    job, reference = in_process
    assert with_job(federation).digest == job.digest
    lines = []
    running.follow(running.submit(), on_line=lines.append)
    deployed = released(federation, job)
    assert deployed.weights_digest == reference.weights_digest, lines[-20:]
    assert deployed.counts == reference.counts
    assert deployed.contributions == reference.contributions


def test_a_secure_sum_over_real_processes_ends_with_the_same_weights_to_the_last_bit(deployment, in_process):
    federation, running = deployment
    _, reference = in_process
    job = with_job(federation, MASKED)
    lines = []
    running.follow(running.submit(), on_line=lines.append)
    masked = released(federation, job)
    assert masked.weights_digest == reference.weights_digest, lines[-20:]
    assert masked.counts == reference.counts
    transcripts = {
        (charge.reserve.purpose, charge.reserve.round_index): charge.reserve.transcript
        for proof in verify_federation(federation.root).sites.values()
        for charge in proof.charges.values()
        if charge.reserve.job == job.digest
    }
    assert len(set(transcripts.values())) == len(transcripts) == SPEC.privacy.rounds + 2


def test_what_the_weights_were_compared_on_is_real(folder, in_process):
    """The photos are the demo's, and the model learnt something from them: equal weights are not all zero."""
    job, reference = in_process
    federation = LocalFederation(root=folder / "in-process")
    release = open_release(
        federation.coordinator.job_folder(job) / "release",
        signed_by=federation.coordinator.read_roster().coordinator,
    )
    assert abs(release.head.thresholds).max() > 0.01
    assert reference.counts.table.sum() == pytest.approx(RECYCLERS * 6, abs=1)
