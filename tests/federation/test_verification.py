"""One byte, one entry, one receipt: whatever is not as it was is named, whoever signed it."""

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused, FedgradeError, LedgerBroken, SignatureRefused
from fedgrade.evaluation import ConfusionCounts, metrics
from fedgrade.federation.payloads import Head, write_head
from fedgrade.federation.release import publish
from fedgrade.federation.site_proof import prove_site
from fedgrade.federation.verification import verify_federation
from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import Roster, SigningKey
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from fedgrade.trust.records import Abort, Commit, DatasetOpened, Genesis, PlanAccepted, Released, Reserve
from tests.federation.small_federation import FIRST, NAMES, POLICY, SmallFederation, ask, quick_noise, with_privacy

SITE = NAMES[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A federation with one finished job; shared, so tests work on copies or put back what they changed."""
    federation = SmallFederation.create(tmp_path_factory.mktemp("whole") / "federation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
        federation.run_in_process(federation.job(with_privacy(rounds=1)))
    return federation


@pytest.fixture(scope="module")
def job(whole):
    return whole.job(with_privacy(rounds=1))


@pytest.fixture
def copy(whole, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(whole.root, tmp_path / "copy")
    return replace(whole, root=tmp_path / "copy")


def checked_files(root: Path):
    patterns = (
        "sites/*/ledger.jsonl",
        "coordinator/ledger.jsonl",
        "jobs/*/receipts/*/*",
        "jobs/*/evaluation/*",
        "jobs/*/release/*",
    )
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def refused(federation, *parts, kind=LedgerBroken):
    with pytest.raises(kind) as error:
        verify_federation(federation.root)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def resigned(federation, name, change):
    """The site's ledger written anew by the site itself, ``change`` having the last word on every entry."""
    key, path = federation.site_keys[name], federation.ledger(name)
    bodies = [entry.body for entry in read_ledger(path, key=key.public)]
    path.unlink()
    with LedgerWriter.open(path, key=key, observe=lambda _: None) as writer:
        for body in bodies:
            for changed in change(body):
                writer.append(changed, now=FIRST)


def test_a_whole_folder_proves_itself(whole, job):
    proof = verify_federation(whole.root, roster=whole.roster)
    assert set(proof.sites) == set(NAMES)
    assert proof.entries == 3 * (3 + 2 * 3) + 1 + 3 + 1
    assert proof.jobs[job.digest].release is not None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_one_changed_byte_in_any_file_is_found_and_named(whole, data):
    path = data.draw(st.sampled_from(checked_files(whole.root)))
    kept = path.read_bytes()
    position = data.draw(st.integers(0, len(kept) - 1))
    change = data.draw(st.integers(1, 255))
    path.write_bytes(kept[:position] + bytes([kept[position] ^ change]) + kept[position + 1 :])
    try:
        with pytest.raises(FedgradeError) as error:
            verify_federation(whole.root)
    finally:
        path.write_bytes(kept)
    named = path.parent if "release" in path.parts else path
    assert str(named) in str(error.value)
    if path.name == "ledger.jsonl":
        entry = kept[:position].count(b"\n")
        assert f"entry {entry}:" in str(error.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_any_file_cut_short_is_found(whole, data):
    path = data.draw(st.sampled_from(checked_files(whole.root)))
    kept = path.read_bytes()
    path.write_bytes(kept[: data.draw(st.integers(0, len(kept) - 1))])
    try:
        with pytest.raises(FedgradeError):
            verify_federation(whole.root)
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize("position", range(9))
def test_a_removed_entry_is_found(copy, position):
    path = copy.ledger(SITE)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:position] + lines[position + 1 :]))
    refused(copy)


@pytest.mark.parametrize("position", range(1, 7))
def test_two_entries_that_changed_places_are_found(copy, position):
    path = copy.ledger(SITE)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[position], lines[position + 1] = lines[position + 1], lines[position]
    path.write_bytes(b"".join(lines))
    refused(copy, f"{path}: entry {position}: does not follow")


@pytest.mark.parametrize("kept", [1, 3, 5, 7, 8])
def test_a_ledger_put_back_to_an_older_copy_is_found(copy, kept):
    path = copy.ledger(SITE)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    refused(copy, "receipts", SITE, "rolled back or forked")


def test_a_ledger_that_was_begun_anew_is_found(copy):
    resigned(copy, SITE, lambda body: [body])
    refused(copy, "rolled back or forked")


def test_swapped_receipts_are_found(copy):
    first, second, *_ = sorted(copy.root.glob(f"jobs/*/receipts/{SITE}/*.json"))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    refused(copy, str(first), "is not the receipt that the coordinator's ledger counted")


def test_a_missing_receipt_is_found(copy):
    path = next(copy.root.glob(f"jobs/*/receipts/{SITE}/00001.json"))
    path.unlink()
    refused(copy, str(path), "No such file")


def test_a_charge_with_less_noise_is_found_whoever_signed_it(copy):
    def cheaper(body):
        if isinstance(body, Reserve) and body.purpose == "train":
            yield replace(body, mechanism=replace(body.mechanism, scale=body.mechanism.scale * 2))
        else:
            yield body

    resigned(copy, SITE, cheaper)
    refused(copy, f"{copy.ledger(SITE)}: entry 5:", "the mechanism is not the one of the job's privacy plan")


def edited(kind, **changes):
    def change(body):
        yield replace(body, **changes) if isinstance(body, kind) else body

    return change


def without(kind):
    return lambda body: [] if isinstance(body, kind) else [body]


def twice(kind):
    return lambda body: [body, body] if isinstance(body, kind) else [body]


def to_the_wrong_account(body):
    if isinstance(body, Reserve):
        yield replace(body, accounts=tuple(replace(one, partition="test") for one in body.accounts))
    else:
        yield body


def on_nobody_s_account(body):
    if isinstance(body, Reserve):
        yield replace(body, accounts=tuple(replace(one, cohort="1999") for one in body.accounts))
    else:
        yield body


def with_other_terms(body):
    yield body
    if isinstance(body, DatasetOpened):
        yield replace(body, manifest_commitment="0" * 64)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without(Reserve), "settles entry 3, which is no open reservation"),
        (twice(Reserve), "centre round 0 attempt 0 is charged twice"),
        (twice(Commit), "which is no open reservation"),
        (without(PlanAccepted), "charges for a job that was never admitted"),
        (without(DatasetOpened), "which was never put under account"),
        (twice(Genesis), "begins with its one genesis entry"),
        (without(Genesis), "begins with its one genesis entry"),
        (edited(Genesis, owner="recycler-b"), "the ledger of site recycler-b, not of site recycler-a"),
        (edited(Genesis, role="coordinator"), "the ledger of coordinator recycler-a"),
        (edited(Commit, reserve=0), "settles entry 0, which is no open reservation"),
        (edited(Commit, round_index=1), "settles entry 3 for another round"),
        (edited(Reserve, epsilon_limit=Fraction(1000)), "the ceiling is not the one"),
        (edited(DatasetOpened, epsilon_limit=Fraction(20)), "the ceiling is not the one"),
        (edited(PlanAccepted, job="0" * 64), "not the one that the entry describes"),
        (edited(PlanAccepted, mode="distributed"), "not the one that the entry describes"),
        (with_other_terms, "manifest_commitment differs from what the ledger has on record"),
        (to_the_wrong_account, "centre charges the wrong account"),
        (on_nobody_s_account, "charges cohort 1999, which was not admitted to the job"),
        (edited(Abort), "rolled back or forked"),
    ],
)
def test_a_ledger_that_its_own_site_rewrote_is_found(copy, change, line):
    resigned(copy, SITE, change)
    refused(copy, line)


def test_a_budget_overrun_is_found_in_a_ledger_that_its_own_site_wrote(copy):
    def lower(body):
        if isinstance(body, DatasetOpened | Reserve):
            yield replace(body, epsilon_limit=Fraction(30))
        else:
            yield body

    resigned(copy, SITE, lower)
    refused(copy, f"{copy.ledger(SITE)}: entry 5:", "the partner's ceiling is 30.00")


def test_further_attempts_beyond_the_ceiling_are_found(copy):
    def more(body):
        yield body
        if isinstance(body, Reserve) and body.purpose == "train":
            yield from (replace(body, attempt=attempt) for attempt in range(1, 9))

    resigned(copy, SITE, more)
    refused(copy, "the partner's ceiling is 100.00")


def test_a_coordinator_s_entry_in_a_site_s_ledger_is_found(copy):
    def foreign(body):
        yield body
        if isinstance(body, DatasetOpened):
            yield Released(job="0" * 64, release_digest="0" * 64)

    resigned(copy, SITE, foreign)
    refused(copy, "a coordinator's entry in a site's ledger")


def recorded(federation, change):
    """The coordinator's ledger written anew by the coordinator itself."""
    key, path = federation.coordinator_key, federation.root / "coordinator" / "ledger.jsonl"
    bodies = [entry.body for entry in read_ledger(path, key=key.public)]
    path.unlink()
    with LedgerWriter.open(path, key=key, observe=lambda _: None) as writer:
        for number, body in enumerate(bodies):
            for changed in change(number, body):
                writer.append(changed, now=FIRST)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda n, body: [replace(body, weights_before="0" * 64)] if n == 2 else [body], "was shown other weights"),
        (lambda n, body: [replace(body, weights_after="0" * 64)] if n == 1 else [body], "did not start where the last"),
        (lambda n, body: [replace(body, receipts={})] if n == 2 else [body], "closed with 0 receipts"),
        (lambda n, body: [replace(body, round_index=4)] if n == 2 else [body], "closes train round 4 as stage 2"),
        (lambda n, body: [] if n == 2 else [body], "closes evaluate round 0 as stage 2"),
        (lambda n, body: [body, body] if n == 2 else [body], "closes train round 0 as stage 3"),
        (lambda n, body: [body, body] if n == 3 else [body], "closes evaluate round 0 as stage 4"),
        (
            lambda n, body: [replace(body, receipts={**body.receipts, "stranger": "0" * 64})] if n == 2 else [body],
            "counts stranger, which does not take part",
        ),
        (
            lambda n, body: [replace(body, receipts=dict([*body.receipts.items()][:1]))] if n == 2 else [body],
            "closed with 1 receipts; aggregation.minimum_sites is 2",
        ),
        (lambda n, body: [] if n == 4 else [body], "does not say that it was published"),
        (lambda n, body: [replace(body, release_digest="0" * 64)] if n == 4 else [body], "is not the one that"),
        (lambda n, body: [replace(body, job="1" * 64)] if n == 4 else [body], "released, but not trained"),
    ],
)
def test_a_log_that_its_own_coordinator_rewrote_is_found(copy, change, line):
    recorded(copy, change)
    refused(copy, line)


def republished(federation, job, *, weights=None, **changes):
    """The coordinator publishes another release of ``job`` and writes that into its ledger, with its own key."""
    opened = federation.release(job)
    head = weights or opened.head
    release = replace(opened.release, weights_digest=digest(write_head(head)), **changes)
    signed = publish(release, head, folder=federation.store(job).release_folder, key=federation.coordinator_key)

    def change(_, body):
        yield replace(body, release_digest=signed) if isinstance(body, Released) else body

    recorded(federation, change)


def test_a_model_that_nobody_trained_is_found_whoever_signed_it(copy, job):
    shape = job.head_shape()
    invented = Head(thresholds=np.ones(shape), centre=np.zeros(shape[1] - 1))
    shutil.rmtree(copy.root / "jobs" / job.digest[:16] / "receipts")
    republished(copy, job, weights=invented, contributions={})
    ends = {"weights_before": digest(write_head(invented)), "weights_after": digest(write_head(invented))}
    recorded(copy, lambda n, body: [replace(body, receipts={}, **ends)] if n in {1, 2, 3} else [body])
    refused(copy, "stage 1 was closed with 0 receipts")


def test_a_model_that_skipped_its_stages_is_found_whoever_signed_it(copy, job):
    """Centre and training are true; the evaluation was left out and its numbers made up."""
    (copy.root / "jobs" / job.digest[:16] / "receipts").joinpath(SITE, "00002.json").unlink()
    for name in NAMES[1:]:
        (copy.root / "jobs" / job.digest[:16] / "receipts" / name / "00002.json").unlink()
    recorded(copy, lambda n, body: [] if n == 3 else [body])
    refused(copy, "was published after 2 of the job's 3 stages")


def test_counts_that_nobody_measured_are_found_whoever_signed_them(copy, job):
    flattering = ConfusionCounts.of(100.0 * np.eye(job.spec.grading.grades))
    republished(copy, job, counts=flattering, metrics=metrics(flattering, job.spec.grading))
    refused(copy, job.digest[:16], "the counts it states are not the sum of what the sites released")


@pytest.mark.parametrize(("harm", "said"), [("gone", "cannot be read"), ("another's", "is not the release that")])
def test_a_measurement_that_is_not_the_site_s_own_is_found(copy, harm, said):
    folder = next(copy.root.glob("jobs/*/evaluation"))
    path = folder / f"{SITE}.safetensors"
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes((folder / f"{NAMES[1]}.safetensors").read_bytes())
    refused(copy, str(path), said)


def test_rounds_of_a_job_that_no_site_admitted_are_found(copy):
    shutil.rmtree(copy.root / "jobs")
    recorded(copy, lambda n, body: [replace(body, job="1" * 64)] if n > 0 else [body])
    refused(copy, "no site's ledger admits it")


def test_a_release_of_another_job_is_found(copy, job):
    folder = copy.root / "jobs" / job.digest[:16] / "release"
    other = copy.job(with_privacy(rounds=2))
    copy.run_in_process(other)
    shutil.rmtree(folder)
    shutil.copytree(copy.root / "jobs" / other.digest[:16] / "release", folder)
    refused(copy, str(folder.parent), "is not the one that")


def test_keys_are_those_of_the_roster_that_is_trusted(copy):
    stranger = Roster(
        coordinator=copy.roster.coordinator, sites={**copy.roster.sites, SITE: SigningKey.generate().public}
    )
    with pytest.raises(LedgerBroken, match="signed by key"):
        verify_federation(copy.root, roster=stranger)
    unknown = Roster(coordinator=copy.roster.coordinator, sites={NAMES[1]: copy.roster.sites[NAMES[1]]})
    with pytest.raises(SignatureRefused, match="is not on the roster"):
        verify_federation(copy.root, roster=unknown)


def test_an_empty_ledger_is_found(copy):
    kept = copy.ledger(SITE).read_bytes()
    copy.ledger(SITE).write_bytes(b"")
    refused(copy, str(copy.ledger(SITE)), "is empty")
    copy.ledger(SITE).write_bytes(kept)
    (copy.root / "coordinator" / "ledger.jsonl").write_bytes(b"")
    refused(copy, str(copy.root / "coordinator" / "ledger.jsonl"), "is empty")


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_a_coordinator_s_ledger_put_back_to_an_older_copy_is_found(copy, kept):
    path = copy.root / "coordinator" / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    refused(copy, "the coordinator's ledger")


def test_a_run_that_was_interrupted_still_verifies(copy):
    """Receipts are kept before the round is closed, so a crash leaves those of the stage that was open."""
    path, (job,) = copy.root / "coordinator" / "ledger.jsonl", copy.root.glob("jobs/*")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    shutil.rmtree(job / "release")
    assert [len(proof.rounds) for proof in verify_federation(copy.root).jobs.values()] == [2]


def test_a_folder_that_is_no_federation_is_refused(tmp_path, copy):
    with pytest.raises(DocumentRefused, match=r"roster.*cannot be read"):
        verify_federation(tmp_path / "nothing")
    shutil.rmtree(copy.root / "sites")
    refused(copy, "no sites/<site>/ledger.jsonl here", kind=DocumentRefused)


def test_a_site_s_ledger_alone_proves_what_it_spent(whole, job):
    proof = prove_site(whole.ledger(SITE), site=SITE, roster=whole.roster)
    rho = job.plan.centre.rho + job.plan.rounds * job.plan.train.rho
    assert proof.job_epsilon(job.digest, partition="train") == zcdp_epsilon(rho, delta=job.plan.delta)
    assert proof.job_epsilon("0" * 64, partition="train") == 0.0
    (account,) = (account for account in proof.accounts if account.partition == "train")
    rising = [charge.epsilon_after(account) for charge in proof.charges_to(account)]
    assert len(rising) == 1 + job.plan.rounds
    assert rising == sorted(rising)


@pytest.mark.usefixtures("quick")
def test_every_observer_s_epsilon_is_at_the_plan_s_delta(tmp_path):
    """The account's own delta is a partner's affair; side by side, only one delta makes four numbers comparable."""
    federation = SmallFederation.create(tmp_path / "federation")
    job = federation.job(with_privacy(rounds=1, delta=1e-6))
    federation.run_in_process(job, policy=replace(POLICY, delta=1e-5))
    observers = verify_federation(federation.root).jobs[job.digest].observers
    rho = job.plan.centre.rho + job.plan.train.rho
    for seen in observers.values():
        assert seen.full_collusion == seen.coordinator == zcdp_epsilon(rho, delta=Fraction(1, 10**6))
        assert seen.model_holder == zcdp_epsilon(rho / len(NAMES), delta=Fraction(1, 10**6))


@pytest.mark.usefixtures("quick")
def test_an_attempt_beyond_the_one_that_was_used_finds_no_company(tmp_path):
    """Only one attempt of a round went into the sum; another is hidden by nobody's noise but its own."""
    federation = SmallFederation.create(tmp_path / "federation")
    job = federation.job(with_privacy(rounds=1))
    with federation.site() as site:
        site.answer(federation.admission(job))
        site.answer(federation.question(job, ask("centre")))
        next((federation.folder(SITE) / "outbox").iterdir()).unlink()  # its reply was lost, and never used
    federation.run_in_process(job)
    observers = verify_federation(federation.root).jobs[job.digest].observers
    centre, train, others = job.plan.centre.rho, job.plan.train.rho, len(NAMES)
    delta = job.plan.delta
    assert observers[NAMES[1]].model_holder == zcdp_epsilon((centre + train) / others, delta=delta)
    assert observers[SITE].model_holder == zcdp_epsilon((centre + train) / others + centre, delta=delta)
    assert observers[SITE].coordinator == zcdp_epsilon(2 * centre + train, delta=delta)
