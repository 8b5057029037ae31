"""What is tampered with afterwards in a job under secure sums: the verifier names it."""

import shutil
from dataclasses import replace

import pytest

from fedgrade.aggregation.secure_sum.evidence import SumEvidence
from fedgrade.federation.messages import ContributeRequest
from fedgrade.federation.store import evaluation_file, evidence_file
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.records import RoundClosed
from tests.federation.lying_coordinator import RECOVERING
from tests.federation.small_federation import NAMES, SmallFederation, quick_noise
from tests.federation.spoilt_folder import recorded, refused
from tests.federation.sum_partners import FIVE, Partners, Wire, at, summing

ONE_ROUND = summing(minimum_sites=2)


def finished(root, names, spec, meddle=None):
    federation = SmallFederation.create(root, names=names)
    with pytest.MonkeyPatch.context() as patch, Partners.of(federation) as partners:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
        federation.run(federation.job(spec), Wire(partners, meddle) if meddle else Wire(partners))
    return federation


@pytest.fixture(scope="module")
def summed(tmp_path_factory):
    """A federation with one finished job under secure sums; tests work on copies."""
    return finished(tmp_path_factory.mktemp("summed") / "federation", NAMES, ONE_ROUND)


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """The same where one site vanished from the evaluation after it had committed, and the total stood."""

    def gone(site, body, pass_on):
        reply = pass_on()
        return None if site == FIVE[4] and at(body, ContributeRequest, "evaluate") else reply

    return finished(tmp_path_factory.mktemp("recovered") / "federation", FIVE, RECOVERING, gone)


@pytest.fixture
def copied(tmp_path):
    def copied(federation):
        shutil.copytree(federation.root, tmp_path / "copied")
        return replace(federation, root=tmp_path / "copied")

    return copied


def job_folder(federation):
    (folder,) = (federation.root / "jobs").iterdir()
    return folder


def with_evidence(federation, change):
    """What sites signed in the sum of the evaluation, changed."""
    path = evidence_file(job_folder(federation))
    path.write_bytes(encode(change(decode(SumEvidence, path.read_bytes()))))


def swapped(entries, one, other):
    return {**entries, one: entries[other], other: entries[one]}


def less(entries, site):
    return {of: raw for of, raw in entries.items() if of != site}


def in_another_task(evidence, **changes):
    return replace(evidence, terms=replace(evidence.terms, task=replace(evidence.terms.task, **changes)))


def test_the_untouched_folders_verify(summed, recovered):
    for federation, sites in ((summed, NAMES), (recovered, FIVE[:4])):
        proof = verify_federation(federation.root, roster=federation.roster)
        (job,) = proof.jobs.values()
        assert set(job.rounds[-1].receipts) == set(sites)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda one: replace(one, vectors=less(one.vectors, NAMES[0])), "adds up 2 sites, and 3 have receipts"),
        (lambda one: replace(one, vectors=swapped(one.vectors, *NAMES[:2])), "signed by key"),
        (lambda one: replace(one, commitments=less(one.commitments, NAMES[0])), "commitments of others than took part"),
        (lambda one: replace(one, commitments=swapped(one.commitments, *NAMES[:2])), "than the one that recycler-a"),
        (lambda one: in_another_task(one, attempt=1), "is about another sum than the receipts"),
        (lambda one: in_another_task(one, job="00" * 32), "is about another sum than the receipts"),
        (lambda one: in_another_task(one, purpose="train"), "is about another sum than the receipts"),
        (lambda one: in_another_task(one, weights_digest="00" * 32), "than the one that recycler-a charged for"),
        (lambda one: in_another_task(one, entry_limit=1), "than the one that recycler-a charged for"),
        (lambda one: replace(one, terms=replace(one.terms, participants=NAMES[:2])), "of others than took part"),
    ],
)
def test_evidence_that_was_changed_is_found(summed, copied, change, line):
    federation = copied(summed)
    with_evidence(federation, change)
    refused(federation, "evaluation", line)


@pytest.mark.parametrize("harm", ["gone", "garbage", "empty", "another's"])
def test_evidence_that_is_none_is_found(summed, recovered, copied, harm):
    federation = copied(summed)
    path = evidence_file(job_folder(federation))
    if harm == "gone":
        path.unlink()
    else:
        others = evidence_file(job_folder(recovered)).read_bytes()
        path.write_bytes({"garbage": b"\xff{}", "empty": b"", "another's": others}[harm])
    refused(federation, str(path))


def test_two_vectors_that_were_swapped_are_found(summed, copied):
    federation = copied(summed)
    one, other = (evaluation_file(job_folder(federation), site) for site in NAMES[:2])
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    refused(federation, str(one), "is not the release that the receipt of recycler-a names")


def test_a_vector_that_is_gone_is_found(summed, copied):
    federation = copied(summed)
    path = evaluation_file(job_folder(federation), NAMES[1])
    path.unlink()
    refused(federation, str(path), "cannot be read")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_attempt_that_was_changed_in_the_coordinator_s_ledger_is_found(summed, copied, stage):
    federation = copied(summed)

    def change(number, body):
        yield replace(body, attempt=body.attempt + 1) if number == stage + 1 and isinstance(body, RoundClosed) else body

    recorded(federation, change)
    refused(federation, f"{stage:05d}.json", "is for another attempt of the sum")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda one: replace(one, revealed=less(one.revealed, FIVE[0])), "3 sites revealed shares; 4 are needed"),
        (lambda one: replace(one, revealed=swapped(one.revealed, *FIVE[:2])), "signed by key"),
        (lambda one: replace(one, votes=less(one.votes, FIVE[0])), "votes of recycler-a are missing"),
        (lambda one: replace(one, votes={}, revealed={}), "votes of recycler-a, recycler-b, recycler-c, recycler-d"),
        (lambda one: replace(one, vectors=less(one.vectors, FIVE[0])), "adds up 3 sites, and 4 have receipts"),
    ],
)
def test_evidence_of_a_recovered_sum_that_was_changed_is_found(recovered, copied, change, line):
    federation = copied(recovered)
    with_evidence(federation, change)
    refused(federation, "evaluation", line)


def charging_for_another(partners, site, purpose, other="00" * 32):
    """Changed software of ``site``: what it writes down is another attempt than the one that it takes part in."""
    charging = partners.sites[site]._charging
    reserve = charging.reserve

    def elsewhere(ask, *, transcript, **named):
        return reserve(ask, transcript=other if ask.purpose == purpose else transcript, **named)

    charging.reserve = elsewhere


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("purpose", ["centre", "train", "evaluate"])
def test_a_site_that_charged_for_another_attempt_than_the_others_is_found(federation, purpose):
    with Partners.of(federation) as partners:
        charging_for_another(partners, NAMES[1], purpose)
        federation.run(federation.job(ONE_ROUND), Wire(partners))
    refused(federation, f"{purpose} round 0", "the charges that its receipts name are not for one secure sum")


@pytest.mark.usefixtures("quick")
def test_a_site_whose_charge_is_for_no_sum_at_all_is_found(federation):
    with Partners.of(federation) as partners:
        charging_for_another(partners, NAMES[1], "train", other="")
        federation.run(federation.job(ONE_ROUND), Wire(partners))
    refused(federation, "the charges that its receipts name are not for one secure sum")


@pytest.mark.usefixtures("quick")
def test_the_one_site_whose_ledger_is_here_charged_for_the_sum_that_is_proved(federation):
    """A partner that has its own ledger alone still sees that its evaluation is in another sum than it agreed to."""
    with Partners.of(federation) as partners:
        for site in NAMES:
            charging_for_another(partners, site, "evaluate")
        federation.run(federation.job(ONE_ROUND), Wire(partners))
    for site in NAMES[1:]:
        shutil.rmtree(federation.folder(site))
    refused(federation, "is of another attempt than the one that recycler-a charged for")
