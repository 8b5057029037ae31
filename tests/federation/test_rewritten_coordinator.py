"""A ledger or a release that its own coordinator wrote anew, with its own key."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from fedgrade.evaluation import ConfusionCounts, metrics
from fedgrade.federation.payloads import Head, write_head
from fedgrade.federation.release import publish
from fedgrade.trust.canonical import digest
from fedgrade.trust.records import Released
from tests.federation.small_federation import NAMES, with_privacy
from tests.federation.spoilt_folder import recorded, refused

SITE = NAMES[0]


@pytest.fixture
def job(whole):
    """The one that is finished."""
    return whole.job(with_privacy(rounds=1))


def counting_one(body):
    """One receipt of several, and nothing said of the others."""
    site = min(body.receipts)
    return replace(body, receipts={site: body.receipts[site]}, ledgers={site: body.ledgers[site]})


def larger(body):
    return replace(body, ledgers={site: replace(state, entries=10) for site, state in body.ledgers.items()})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda n, body: [replace(body, weights_before="0" * 64)] if n == 2 else [body], "was shown other weights"),
        (lambda n, body: [replace(body, weights_after="0" * 64)] if n == 1 else [body], "did not start where the last"),
        (lambda n, body: [replace(body, receipts={}, ledgers={})] if n == 2 else [body], "closed with 0 receipts"),
        (lambda n, body: [replace(body, round_index=4)] if n == 2 else [body], "closes train round 4 as stage 2"),
        (lambda n, body: [] if n == 2 else [body], "closes evaluate round 0 as stage 2"),
        (lambda n, body: [body, body] if n == 2 else [body], "closes train round 0 as stage 3"),
        (lambda n, body: [body, body] if n == 3 else [body], "closes evaluate round 0 as stage 4"),
        (
            lambda n, body: [replace(body, receipts={**body.receipts, "stranger": "0" * 64})] if n == 2 else [body],
            "counts stranger, which does not take part",
        ),
        (lambda n, body: [replace(body, ledgers={})] if n == 2 else [body], "stage 2 does not say where the ledgers"),
        (lambda n, body: [larger(body)] if n == 2 else [body], "says that it was the last of 10"),
        (
            lambda n, body: [counting_one(body)] if n == 2 else [body],
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
    signed = publish(release, head, to=federation.store(job).release, key=federation.coordinator_key)

    def change(_, body):
        yield replace(body, release_digest=signed) if isinstance(body, Released) else body

    recorded(federation, change)


def test_a_model_that_nobody_trained_is_found_whoever_signed_it(copy, job):
    shape = job.head_shape()
    invented = Head(thresholds=np.ones(shape), centre=np.zeros(shape[1] - 1))
    shutil.rmtree(copy.root / "jobs" / job.digest[:16] / "receipts")
    republished(copy, job, weights=invented, contributions={})
    ends = {"weights_before": digest(write_head(invented)), "weights_after": digest(write_head(invented))}
    recorded(copy, lambda n, body: [replace(body, receipts={}, ledgers={}, **ends)] if n in {1, 2, 3} else [body])
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


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_a_coordinator_s_ledger_put_back_to_an_older_copy_is_found(copy, kept):
    path = copy.root / "coordinator" / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    refused(copy, "the coordinator's ledger")
