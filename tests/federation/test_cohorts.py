"""Items that came in later have budgets of their own, and a cohort that has none left stays out and stops nobody."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from fedgrade.data.manifest import Split, read_manifest, write_manifest
from fedgrade.errors import LedgerBroken
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.messages import Admitted, Contribution, Refusal
from fedgrade.federation.site_proof import prove_site
from fedgrade.federation.verification import verify_federation
from fedgrade.model.weights import read_weights
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from fedgrade.trust.records import PlanAccepted, Reserve
from tests.federation.small_federation import (
    DECLARED,
    NAMES,
    POLICY,
    SCALE,
    ask,
    quick_noise,
    with_privacy,
    write_photos,
    zeros,
)

SITE = NAMES[0]
OLD = {"2026": ("manifest.csv", DECLARED)}
BOTH = {**OLD, "2027": ("later.csv", DECLARED // 2)}
ALL = DECLARED + DECLARED // 2  # what the site declares once both have come in


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)


@pytest.fixture
def later(federation):
    """New items at one site, listed in a manifest of their own."""
    folder = federation.folder(SITE)
    photos = write_photos(folder / "later", first=5000)
    for photo in photos:
        (folder / "later" / photo.path).rename(folder / "photos" / photo.path)
    (folder / "later.csv").write_bytes(write_manifest(photos))
    return photos


def told(federation, site, message):
    return federation.opened(site.answer(message)).document.body


def spent(federation):
    """Epsilon of each account of the site, by cohort and side."""
    proof = prove_site(federation.ledger(SITE), site=SITE, roster=federation.roster)
    return {(key.cohort, key.partition): account.epsilon for key, account in proof.accounts.items()}


def run_alone(federation, job, **settings):
    """The whole of ``job`` at one site, at weights of zero; what it said last."""
    with federation.site(**settings) as site:
        assert isinstance(told(federation, site, federation.admission(job)), Admitted)
        for purpose, round_index in (
            ("centre", 0),
            *(("train", one) for one in range(job.plan.rounds)),
            ("evaluate", 0),
        ):
            body = told(federation, site, federation.question(job, ask(purpose, round_index)))
            assert isinstance(body, Contribution)


@pytest.mark.usefixtures("quick", "later")
def test_an_item_pays_only_for_what_ran_since_it_came_in(federation):
    run_alone(federation, federation.job(nonce="before"))
    run_alone(federation, federation.job(nonce="after", declared=ALL), cohorts=BOTH)
    epsilon = spent(federation)
    for side in ("train", "test"):
        assert epsilon["2027", side] < epsilon["2026", side]
    proof = prove_site(federation.ledger(SITE), site=SITE, roster=federation.roster)
    by_cohort = {
        key.cohort: account.spending.rho for key, account in proof.accounts.items() if key.partition == "train"
    }
    assert by_cohort["2026"] == 2 * by_cohort["2027"]


@pytest.mark.usefixtures("quick", "later")
def test_an_exhausted_cohort_drops_out_and_the_others_train_on(federation):
    policy = replace(POLICY, epsilon_limit=60.0)
    run_alone(federation, federation.job(nonce="before"), policy=policy)
    with federation.site(policy=policy) as site:
        body = told(federation, site, federation.admission(federation.job(nonce="refused")))
    assert isinstance(body, Refusal)
    assert body.code == "budget"
    last = federation.job(nonce="last", declared=ALL)
    run_alone(federation, last, policy=policy, cohorts=BOTH)
    charged = [reserve for reserve in federation.charges(SITE) if reserve.job == last.digest]
    assert {account.cohort for reserve in charged for account in reserve.accounts} == {"2027"}
    assert max(spent(federation).values()) <= 60.0


@pytest.mark.usefixtures("later")
def test_the_release_of_both_cohorts_is_that_of_their_items_together(federation, monkeypatch):
    """Without noise, sums over cohorts add up: no item is missing, none is counted twice."""
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", zeros)
    sums = {}
    old, new = {"a": ("manifest.csv", 8)}, {"b": ("later.csv", 8)}
    for name, cohorts in (("old", old), ("new", new), ("both", {**old, **new})):
        federation.ledger(SITE).unlink(missing_ok=True)
        (federation.folder(SITE) / "members.json").unlink(missing_ok=True)
        job = federation.job(nonce=name, declared=8 * len(cohorts))
        with federation.site(cohorts=cohorts) as site:
            told(federation, site, federation.admission(job))
            reply = federation.opened(site.answer(federation.question(job, ask("centre"))))
        size = job.head_shape()[1] - 1
        sums[name] = read_weights(reply.tensors, expected={"release": ((size,), "int64")})["release"]
    assert np.array_equal(sums["both"], sums["old"] + sums["new"])
    assert not np.array_equal(sums["both"], sums["old"])


@pytest.mark.usefixtures("quick", "later")
def test_a_cohort_that_runs_dry_in_mid_job_leaves_the_rest_of_it_to_the_others(federation):
    """Attempts that are asked again are charged again, and may use up what admission had found enough."""
    run_alone(federation, federation.job(with_privacy(target_epsilon=10.0, evaluation_epsilon=1.0), nonce="before"))
    job = federation.job(with_privacy(target_epsilon=20.0, evaluation_epsilon=1.0, rounds=1), nonce="dry", declared=ALL)
    exact = replace(POLICY, epsilon_limit=32.0)
    with federation.site(policy=exact, cohorts=BOTH) as site:
        told(federation, site, federation.admission(job))
        told(federation, site, federation.question(job, ask("centre")))
        for attempt in range(3):
            told(federation, site, federation.question(job, ask("train", 0, attempt)))
    cohorts = [
        {account.cohort for account in charge.accounts}
        for charge in federation.charges(SITE)
        if charge.job == job.digest
    ]
    assert cohorts[0] == cohorts[1] == {"2026", "2027"}
    assert cohorts[-1] == {"2027"}
    assert max(spent(federation).values()) <= 32.0


@pytest.mark.usefixtures("later")
def test_too_few_items_left_with_budget_are_no_company(federation):
    policy = replace(POLICY, epsilon_limit=60.0, minimum_items=DECLARED - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
        run_alone(federation, federation.job(nonce="before"), policy=policy)
    with federation.site(policy=policy, cohorts=BOTH) as site:
        body = told(federation, site, federation.admission(federation.job(nonce="last", declared=ALL)))
    assert isinstance(body, Refusal)
    assert body.code == "policy"
    assert "only 4 declared items have budget left" in body.reason


def test_a_source_keeps_its_side_in_every_cohort(federation, later, caplog):
    other = {Split.TRAIN: Split.TEST, Split.TEST: Split.TRAIN}
    old = read_manifest((federation.folder(SITE) / "manifest.csv").read_bytes(), SCALE).photos[0]
    moved = [
        replace(photo, source=old.source, split=other[old.split]) if photo.item == later[0].item else photo
        for photo in later
    ]
    (federation.folder(SITE) / "later.csv").write_bytes(write_manifest(moved))
    with federation.site(cohorts=BOTH) as site:
        body = told(federation, site, federation.admission(federation.job(declared=ALL)))
    assert isinstance(body, Refusal)
    assert body.code == "data"
    assert "a source keeps one side in every cohort" in caplog.text
    assert not federation.charges(SITE)


@pytest.mark.usefixtures("quick", "later")
def test_a_restart_in_mid_job_pays_from_the_cohorts_that_were_admitted(federation):
    """A cohort whose budget the partner raised meanwhile was not admitted to the job, and stays out of it."""
    tight = replace(POLICY, epsilon_limit=60.0)
    run_alone(federation, federation.job(nonce="before"), policy=tight)
    job = federation.job(declared=ALL)
    with federation.site(policy=tight, cohorts=BOTH) as site:
        told(federation, site, federation.admission(job))
        told(federation, site, federation.question(job, ask("centre")))
    with federation.site(cohorts=BOTH) as site:
        assert isinstance(told(federation, site, federation.question(job, ask("train"))), Contribution)
    assert {account.cohort for account in federation.charges(SITE)[-1].accounts} == {"2027"}


@pytest.mark.usefixtures("quick", "later")
def test_a_federation_with_cohorts_verifies_and_its_ledger_says_who_paid(federation):
    with ExitStack() as stack:
        held = {SITE: BOTH, **dict.fromkeys(NAMES[1:], OLD)}
        answers = {name: stack.enter_context(federation.site(name, cohorts=held[name])).answer for name in NAMES}
        federation.run(federation.job(with_privacy(rounds=1), declared=ALL), InProcessCohort(sites=answers))
    proof = verify_federation(federation.root)
    assert {key.cohort for key in proof.sites[SITE].accounts} == {"2026", "2027"}
    assert {key.cohort for key in proof.sites[NAMES[1]].accounts} == {"2026"}


def rewritten(federation, change):
    """The site's ledger written anew with its own key, each entry as ``change`` leaves it."""
    path, key = federation.ledger(SITE), federation.site_keys[SITE]
    bodies = [entry.body for entry in read_ledger(path, key=key.public)]
    path.unlink()
    with LedgerWriter.open(path, key=key, observe=lambda _: None) as writer:
        for body in bodies:
            writer.append(change(body), now=federation.clock())


@pytest.mark.usefixtures("quick", "later")
def test_a_ledger_that_spares_an_admitted_cohort_nothing_and_charges_another_is_broken(federation):
    run_alone(federation, federation.job(with_privacy(rounds=1), declared=ALL), cohorts=BOTH)

    def stays_out(body):
        if isinstance(body, PlanAccepted):
            return replace(body, accounts=tuple(one for one in body.accounts if one.cohort == "2026"))
        return body

    rewritten(federation, stays_out)
    with pytest.raises(LedgerBroken, match="charges cohort 2027, which was not admitted to the job"):
        prove_site(federation.ledger(SITE), site=SITE, roster=federation.roster)


@pytest.mark.usefixtures("quick", "later")
def test_charges_list_every_cohort_once(federation):
    run_alone(federation, federation.job(with_privacy(rounds=1), declared=ALL), cohorts=BOTH)
    for charge in federation.charges(SITE):
        assert isinstance(charge, Reserve)
        assert [account.cohort for account in charge.accounts] == ["2026", "2027"]
