"""A ledger that its own site wrote anew, with its own key: the rules of what may follow what give it away."""

from dataclasses import replace
from fractions import Fraction

import pytest

from fedgrade.trust.records import Abort, Commit, DatasetOpened, Genesis, PlanAccepted, Released, Reserve
from tests.federation.small_federation import NAMES
from tests.federation.spoilt_folder import refused, resigned

SITE = NAMES[0]


def test_a_charge_with_less_noise_is_found_whoever_signed_it(copy):
    def cheaper(body):
        if isinstance(body, Reserve) and body.purpose == "train":
            yield replace(body, mechanism=replace(body.mechanism, scale=body.mechanism.scale * 2))
        else:
            yield body

    resigned(copy, SITE, cheaper)
    refused(copy, f"{copy.ledger(SITE)}: entry 6:", "the mechanism is not the one of the job's privacy plan")


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


def on_one_side(body):
    """Held-out items pay for nothing."""
    yield replace(body, accounts=body.accounts[:1]) if isinstance(body, PlanAccepted) else body


def of_one_account_twice(body):
    yield replace(body, accounts=(*body.accounts, body.accounts[0])) if isinstance(body, PlanAccepted) else body


def of_a_stranger(body):
    if isinstance(body, PlanAccepted):
        yield replace(body, accounts=(*body.accounts, replace(body.accounts[0], partner=NAMES[1])))
    else:
        yield body


def with_other_terms(body):
    yield body
    if isinstance(body, DatasetOpened):
        yield replace(body, manifest_commitment="0" * 64)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without(Reserve), "settles entry 4, which is no open reservation"),
        (twice(Reserve), "centre round 0 attempt 0 is charged twice"),
        (twice(Commit), "which is no open reservation"),
        (without(PlanAccepted), "charges for a job that was never admitted"),
        (without(DatasetOpened), "which was never put under account"),
        (twice(Genesis), "begins with its one genesis entry"),
        (without(Genesis), "begins with its one genesis entry"),
        (edited(Genesis, owner="recycler-b"), "the ledger of site recycler-b, not of site recycler-a"),
        (edited(Genesis, role="coordinator"), "the ledger of coordinator recycler-a"),
        (edited(Commit, reserve=0), "settles entry 0, which is no open reservation"),
        (edited(Commit, round_index=1), "settles entry 4 for another round"),
        (edited(Reserve, epsilon_limit=Fraction(1000)), "the ceiling is not the one"),
        (edited(DatasetOpened, epsilon_limit=Fraction(200)), "the ceiling is not the one"),
        (edited(Reserve, round_index=1), "centre round 1: the job's plan has no such round"),
        (twice(PlanAccepted), "a second time; who pays for it was settled the first time"),
        (on_one_side, "admits a job without an account on each side"),
        (of_one_account_twice, "admits an account twice"),
        (of_a_stranger, "is not of this site's one data lineage"),
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


def test_a_job_beyond_the_budget_is_found_in_a_ledger_that_its_own_site_wrote(copy):
    def lower(body):
        if isinstance(body, DatasetOpened | Reserve):
            yield replace(body, epsilon_limit=Fraction(30))
        else:
            yield body

    resigned(copy, SITE, lower)
    refused(copy, f"{copy.ledger(SITE)}: entry 2:", "the partner's ceiling is 30.00")


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


def test_a_ledger_that_was_begun_anew_is_found(copy):
    resigned(copy, SITE, lambda body: [body])
    refused(copy, "rolled back or forked")
