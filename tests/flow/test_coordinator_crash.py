"""A coordinator that dies after every step: the run goes on from its checkpoint, and nobody pays twice for a round."""

import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest

from fedgrade.errors import DocumentRefused, LedgerBroken, ModelRefused, SignatureRefused
from fedgrade.federation import rounds
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.rounds import RoundLog
from fedgrade.federation.store import Folder, RunStore
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.identity import SigningKey
from tests.federation.small_federation import NAMES, with_privacy

SPEC = with_privacy(rounds=1)  # centre, one round, evaluation
STAGES = 3
STEPS = [
    *((owner, name, 1, after) for owner, name in (
        (rounds, "_advance"), (RunStore, "keep_receipts"), (RoundLog, "close_round"), (RunStore, "save")
    ) for after in (False, True)),
    (RunStore, "save", 0, True),
    (RunStore, "save", STAGES - 1, True),
    *((owner, name, 0, after) for owner, name in (
        (rounds, "publish"), (RoundLog, "release")
    ) for after in (False, True)),
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick")


class PowerCut(BaseException):
    """The process is gone."""


class Quiet:
    """A cohort in which the named sites stay silent."""

    def __init__(self, sites, silent=()):
        self.inner = InProcessCohort(sites=sites)
        self.silent = set(silent)

    def ask(self, requests, *, deadline_seconds):
        heard = {site: raw for site, raw in requests.items() if site not in self.silent}
        return self.inner.ask(heard, deadline_seconds=deadline_seconds)


@contextmanager
def power_cut(owner, name, call, *, after):
    """The power goes at the given call of ``name``, before or after it has done its work."""
    with pytest.MonkeyPatch.context() as patch:
        strike(patch, owner, name, call, after=after)
        with pytest.raises(PowerCut):
            yield


def strike(patch, owner, name, call, *, after):
    real, calls = getattr(owner, name), iter(range(100))

    def cut(*arguments, **named):
        if next(calls) != call:
            return real(*arguments, **named)
        if after:
            real(*arguments, **named)
        raise PowerCut

    patch.setattr(owner, name, cut)


def replayed(federation, job):
    """The weights that an undisturbed coordinator gets from the same sites, which resend what they once sent."""
    shutil.rmtree(federation.root / "jobs")
    # As before the release: a ledger that has one lets nobody make another.
    *lines, _released = federation.coordinator_ledger.read_bytes().splitlines(keepends=True)
    federation.coordinator_ledger.write_bytes(b"".join(lines))
    before = {site: federation.charges(site) for site in NAMES}
    release = federation.run_in_process(job)
    assert {site: federation.charges(site) for site in NAMES} == before
    return release.release


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    STEPS,
    ids=[f"{'after' if after else 'before'} {name} {call}" for _, name, call, after in STEPS],
)
def test_a_resumed_run_ends_where_an_undisturbed_one_does(federation, owner, name, call, after):
    job = federation.job(SPEC)
    with federation.answers() as answers:
        with power_cut(owner, name, call, after=after):
            federation.run(job, InProcessCohort(sites=answers))
        federation.run(job, InProcessCohort(sites=answers))

    proof = verify_federation(federation.root)
    assert len(proof.jobs[job.digest].rounds) == STAGES
    assert {site: len(federation.charges(site)) for site in NAMES} == dict.fromkeys(NAMES, STAGES)
    resumed, undisturbed = federation.release(job).release, replayed(federation, job)
    assert resumed.weights_digest == undisturbed.weights_digest
    assert resumed.counts == undisturbed.counts
    assert resumed.contributions == undisturbed.contributions


def test_a_watcher_that_fails_does_not_cost_a_round(federation):
    job = federation.job(SPEC)

    def report(progress):
        if progress.stage == 2:
            raise PowerCut

    with federation.answers() as answers:
        with pytest.raises(PowerCut):
            federation.run(job, InProcessCohort(sites=answers), report=report)
        stages = []
        federation.run(job, InProcessCohort(sites=answers), report=lambda progress: stages.append(progress.stage))
    assert stages == [3]
    assert {len(federation.charges(site)) for site in NAMES} == {STAGES}


def test_a_run_resumes_with_sites_that_were_restarted_too(federation):
    job = federation.job(SPEC)
    with federation.answers() as answers, power_cut(RunStore, "save", 1, after=False):
        federation.run(job, InProcessCohort(sites=answers))
    federation.run_in_process(job)
    assert {len(federation.charges(site)) for site in NAMES} == {STAGES}
    verify_federation(federation.root)


def test_a_stage_that_was_closed_without_a_site_stays_without_it(federation):
    """Closed in the ledger, not yet in the checkpoint; the site that was silent is back. The record must not change."""
    job, late = federation.job(SPEC), NAMES[2]
    with federation.answers() as answers:
        cohort = Quiet(answers)
        with power_cut(RoundLog, "close_round", 1, after=True):
            federation.run(job, cohort, report=lambda _: cohort.silent.add(late))
        cohort.silent.clear()
        federation.run(job, cohort)
    assert [charge.purpose for charge in federation.charges(late)] == ["centre", "evaluate"]
    assert federation.release(job).release.contributions == {NAMES[0]: 3, NAMES[1]: 3, late: 2}
    verify_federation(federation.root)


def test_a_stage_that_was_decided_before_a_crash_stands_although_one_of_its_sites_is_gone(federation):
    job, gone = federation.job(SPEC), NAMES[2]
    with federation.answers() as answers:
        with power_cut(RoundLog, "close_round", 1, after=False):
            federation.run(job, Quiet(answers))
        federation.run(job, Quiet(answers, silent=[gone]))
    proof = verify_federation(federation.root)
    assert [len(closed.receipts) for closed in proof.jobs[job.digest].rounds] == [3, 3, 2]
    assert [len(federation.charges(site)) for site in NAMES] == [STAGES, STAGES, STAGES - 1]


def test_a_finished_run_that_is_started_again_costs_nobody_anything(federation):
    job = federation.job(SPEC)
    first = federation.run_in_process(job)
    before = {site: federation.entries(site) for site in NAMES}
    again = federation.run_in_process(job)
    # The release that is there, and nobody was asked.
    assert again.digest == first.digest
    assert {site: federation.entries(site) for site in NAMES} == before
    verify_federation(federation.root)


def test_a_checkpoint_of_another_job_is_refused(federation):
    job, other = federation.job(SPEC), federation.job(SPEC, nonce="other")
    federation.run_in_process(job)
    with pytest.raises(DocumentRefused, match=f"belongs to job {job.digest[:16]}"):
        federation.store(job).load(other)


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_damaged_checkpoint_is_refused_and_not_trained_on(federation, harm):
    job = federation.job(SPEC)
    federation.run_in_process(job)
    (arrays,) = (federation.root / "jobs" / job.digest[:16] / "checkpoint").glob("*.safetensors")
    if harm == "gone":
        arrays.unlink()
    else:
        raw = arrays.read_bytes()
        arrays.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ModelRefused, match="checkpoint"):
        federation.store(job).load(job)


def interrupted(federation, answers):
    """A job whose coordinator died before its second stage, and its state."""
    job = federation.job(SPEC)
    with power_cut(rounds, "_advance", 1, after=False):
        federation.run(job, Quiet(answers))
    return job, federation.store(job).load(job)


def test_a_checkpoint_that_another_key_signed_is_refused_before_anybody_is_asked(federation):
    with federation.answers() as answers:
        job, state = interrupted(federation, answers)
        RunStore(Folder(federation.root / "jobs" / job.digest[:16]), key=SigningKey.generate()).save(state, job)
        before = {site: federation.entries(site) for site in NAMES}
        with pytest.raises(SignatureRefused, match=r"checkpoint .*signed by key"):
            federation.run(job, Quiet(answers))
    assert {site: federation.entries(site) for site in NAMES} == before


def test_a_checkpoint_with_other_weights_than_the_ledger_says_is_refused_before_anybody_is_asked(federation):
    with federation.answers() as answers:
        job, state = interrupted(federation, answers)
        other = replace(state, server=replace(state.server, weights=state.server.weights + 1.0))
        federation.store(job).save(replace(other, closing=None), job)
        before = {site: federation.entries(site) for site in NAMES}
        with pytest.raises(LedgerBroken, match=r"centre round 0: ended with weights .* do not belong together"):
            federation.run(job, Quiet(answers))
    assert {site: federation.entries(site) for site in NAMES} == before
