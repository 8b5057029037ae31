"""Items that came in later have budgets of their own, and a cohort that has none left stays out and stops nobody."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest

from fedgrade.data.manifest import Split, read_manifest, write_manifest
from fedgrade.errors import LedgerBroken, PlanRefused
from fedgrade.federation.charging import Ask, Charging
from fedgrade.federation.forecast import Standing, forecast
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.messages import Admitted, Contribution, Refusal
from fedgrade.federation.site_proof import prove_site
from fedgrade.federation.verification import verify_federation
from fedgrade.model.weights import read_weights
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from fedgrade.trust.records import AccountKey, PlanAccepted, Reserve
from tests.federation.small_federation import (
    DECLARED,
    LOCAL_SGD,
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


@pytest.mark.usefixtures("quick", "later")
@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_a_cohort_that_runs_dry_in_mid_job_does_not_leave_a_handful_alone(federation, purpose):
    """Company is asked for again at every charge, and before it."""
    spec = {
        "train": with_privacy(target_epsilon=20.0, evaluation_epsilon=1.0, rounds=1),
        "evaluate": with_privacy(target_epsilon=1.0, evaluation_epsilon=20.0, rounds=1),
    }[purpose]
    early = {"train": {"target_epsilon": 10.0}, "evaluate": {"evaluation_epsilon": 10.0}}[purpose]
    run_alone(federation, federation.job(with_privacy(**{"target_epsilon": 1.0, "evaluation_epsilon": 1.0, **early})))
    policy = replace(POLICY, epsilon_limit=32.0, minimum_items=DECLARED)
    job = federation.job(spec, nonce="dry", declared=ALL)
    replies = []
    with federation.site(policy=policy, cohorts=BOTH) as site:
        assert isinstance(told(federation, site, federation.admission(job)), Admitted)
        for question in [ask("centre"), *(ask(purpose, 0, attempt) for attempt in range(3))]:
            before = federation.ledger(SITE).read_bytes()
            replies.append(told(federation, site, federation.question(job, question)))
    assert isinstance(replies[1], Contribution)
    assert isinstance(replies[-1], Refusal)
    assert replies[-1].code == "policy"
    assert "only 4 declared items have budget left for it; policy.minimum_items is 8" in replies[-1].reason
    assert federation.ledger(SITE).read_bytes() == before
    paid = [charge.accounts for charge in federation.charges(SITE) if charge.job == job.digest]
    assert all({account.cohort for account in accounts} == {"2026", "2027"} for accounts in paid)


@pytest.mark.usefixtures("quick", "later")
def test_held_out_items_that_would_be_left_alone_are_no_company_either(federation):
    """A job that could be trained and not evaluated is refused before anything is spent on it."""
    early = with_privacy(target_epsilon=1.0, evaluation_epsilon=10.0, rounds=1)
    run_alone(federation, federation.job(early, nonce="before"))
    policy = replace(POLICY, epsilon_limit=15.0, minimum_items=DECLARED)
    job = federation.job(replace(early, name="last"), declared=ALL)
    with federation.site(policy=policy, cohorts=BOTH) as site:
        body = told(federation, site, federation.admission(job))
    assert isinstance(body, Refusal)
    assert body.code == "policy"
    assert "only 4 declared items have budget left" in body.reason


MIXED = replace(
    POLICY, modes=("local", "local_sgd"), delta=1e-8, epsilon_limit=1000.0, epsilon_per_job=200.0, minimum_items=4
)
SGD = replace(LOCAL_SGD, privacy=replace(LOCAL_SGD.privacy, delta=1e-8))


@pytest.mark.usefixtures("quick", "later")
def test_a_cohort_without_a_share_of_delta_for_one_more_poisson_job_stays_out_like_any_exhausted_one(federation):
    """The k-th such job takes delta / 2^(k+1) of an account: at a delta of 1e-8 there is none left for the third."""
    job = federation.job(SGD, nonce="third")
    with federation.site(policy=MIXED) as site:
        for nonce in ("first", "second"):
            admission = federation.admission(federation.job(SGD, nonce=nonce))
            assert isinstance(told(federation, site, admission), Admitted)
    train = AccountKey(partner=SITE, lineage=f"squares-{SITE}", cohort="2026", partition="train")
    path, key = federation.ledger(SITE), federation.site_keys[SITE]
    with Charging.open(path, site=SITE, key=key, clock=federation.clock) as charging:
        for nonce in ("first", "second"):
            charging.reserve(
                Ask(job=federation.job(SGD, nonce=nonce).digest, purpose="train", round_index=0, attempt=0),
                accounts=(train,),
                mechanism=job.plan.train,
                ceiling=MIXED.ceiling,
                weights_digest="0" * 64,
            )
        spending = charging.spending(train).charged(job.plan.train, job=job.digest)
        with pytest.raises(PlanRefused, match="delta"):
            spending.epsilon(delta=MIXED.ceiling.delta, composition="mixed")
    before = path.read_bytes()
    with federation.site(policy=MIXED) as site:
        refused = told(federation, site, federation.admission(job))
    assert isinstance(refused, Refusal)
    assert (refused.code, path.read_bytes()) == ("budget", before)
    assert "wait for a new ingestion cohort" in refused.reason
    proof = prove_site(path, site=SITE, roster=federation.roster)
    old = Standing(policy=MIXED, proof=proof, lineage=train.lineage, cohorts={"2026": DECLARED})
    assert forecast(job, standings={SITE: old}).sites[0].refusals == (refused.reason,)
    both = federation.job(SGD, nonce="both", declared=ALL)
    with federation.site(policy=MIXED, cohorts=BOTH) as site:
        assert isinstance(told(federation, site, federation.admission(both)), Admitted)
    accepted = [entry.body for entry in federation.entries(SITE) if isinstance(entry.body, PlanAccepted)][-1]
    assert {account.cohort for account in accepted.accounts if account.partition == "train"} == {"2027"}
    new = replace(old, cohorts={"2026": DECLARED, "2027": DECLARED // 2})
    foretold = forecast(both, standings={SITE: new}).sites[0]
    assert (foretold.refusals, len(foretold.exhausted)) == ((), 1)


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
    with pytest.raises(LedgerBroken, match=r"which was not admitted to the job|that could was left out"):
        prove_site(federation.ledger(SITE), site=SITE, roster=federation.roster)


@pytest.mark.usefixtures("quick", "later")
def test_charges_list_every_cohort_once(federation):
    run_alone(federation, federation.job(with_privacy(rounds=1), declared=ALL), cohorts=BOTH)
    for charge in federation.charges(SITE):
        assert isinstance(charge, Reserve)
        assert [account.cohort for account in charge.accounts] == ["2026", "2027"]
