"""One byte, one entry, one receipt: whatever is not as it was is named, whoever signed it."""

import shutil
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused, FedgradeError, LedgerBroken, SignatureRefused
from fedgrade.federation.site_proof import prove_site
from fedgrade.federation.verification import verify_federation
from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.trust.identity import Roster, SigningKey
from fedgrade.trust.records import Reserve
from tests.federation.small_federation import NAMES, POLICY, SmallFederation, ask, with_privacy
from tests.federation.spoilt_folder import checked_files, refused

SITE = NAMES[0]


@pytest.fixture
def job(whole):
    """The one that is finished."""
    return whole.job(with_privacy(rounds=1))


def test_a_whole_folder_proves_itself(whole, job):
    proof = verify_federation(whole.root, roster=whole.roster)
    assert set(proof.sites) == set(NAMES)
    assert proof.entries == 3 * (4 + 2 * 3) + 1 + 3 + 1
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


def test_a_run_that_was_interrupted_still_verifies(copy):
    """Receipts are kept before the round is closed, so a crash leaves those of the stage that was open."""
    path, (job,) = copy.root / "coordinator" / "ledger.jsonl", copy.root.glob("jobs/*")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    shutil.rmtree(job / "release")
    assert [len(proof.rounds) for proof in verify_federation(copy.root).jobs.values()] == [2]


def forgotten_by_the_coordinator(federation, job, *, entries, stages):
    """The coordinator puts its ledger back, and removes from its folders all that the ledger no longer knows of."""
    path, folder = federation.coordinator_ledger, federation.root / "jobs" / job.digest[:16]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:entries]))
    for receipt in folder.glob("receipts/*/*.json"):
        if int(receipt.stem) >= stages:
            receipt.unlink()
    for gone in (folder / "release", folder / "evaluation", federation.root / "coordinator" / "witnessed"):
        shutil.rmtree(gone)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("partial", [False, True], ids=["all ledgers", "one is missing"])
def test_a_job_that_coordinator_and_a_site_forgot_together_stands_in_an_honest_site_s_ledger(copy, partial):
    culprit, honest, other = NAMES
    entries, closed = len(copy.entries(culprit)), len(copy.coordinator_ledger.read_bytes().splitlines())
    hidden = copy.job(with_privacy(rounds=1), nonce="hidden")
    copy.run_in_process(hidden)
    verify_federation(copy.root)
    forgotten_by_the_coordinator(copy, hidden, entries=closed, stages=0)
    path = copy.ledger(culprit)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:entries]))
    if partial:
        shutil.rmtree(copy.folder(other))
    train = next(
        entry.sequence
        for entry in copy.entries(honest)
        if isinstance(entry.body, Reserve) and (entry.body.job, entry.body.purpose) == (hidden.digest, "train")
    )
    refused(copy, f"ledger of {honest}: entry {train}:", hidden.digest[:16], "does not have it: it was rolled back")


@pytest.mark.parametrize("stages", [0, 1])
def test_stages_that_the_coordinator_forgot_stand_in_the_ledgers_of_the_sites(copy, job, stages):
    forgotten_by_the_coordinator(copy, job, entries=1 + stages, stages=stages)
    refused(copy, f"ledger of {SITE}: entry", job.digest[:16], f"stage {stages + 1} was closed", "rolled back")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("attempts", [1, 3])
def test_a_run_that_was_given_up_in_its_first_stage_still_verifies(copy, attempts):
    """A coordinator that never came back left no entry of its own; the sites paid for what they sent."""
    given_up = copy.job(with_privacy(rounds=1), nonce="given up")
    with copy.site() as site:
        site.answer(copy.admission(given_up))
        for attempt in range(attempts):
            site.answer(copy.question(given_up, ask("centre", 0, attempt)))
    with copy.site(NAMES[1]) as silent:
        silent.answer(copy.admission(given_up, name=NAMES[1]))  # admitted, never charged
    copy.run_in_process(copy.job(with_privacy(rounds=1), nonce="next"))
    proof = verify_federation(copy.root)
    assert sum(charge.reserve.job == given_up.digest for charge in proof.sites[SITE].charges.values()) == attempts
    assert given_up.digest not in proof.jobs


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
        (reply,) = (federation.folder(SITE) / "outbox").glob("*.reply")
        reply.unlink()  # it was lost, and never used
    federation.run_in_process(job)
    observers = verify_federation(federation.root).jobs[job.digest].observers
    centre, train, others = job.plan.centre.rho, job.plan.train.rho, len(NAMES)
    delta = job.plan.delta
    assert observers[NAMES[1]].model_holder == zcdp_epsilon((centre + train) / others, delta=delta)
    assert observers[SITE].model_holder == zcdp_epsilon((centre + train) / others + centre, delta=delta)
    assert observers[SITE].coordinator == zcdp_epsilon(2 * centre + train, delta=delta)
