"""Every pair of who dies and at which step, each in a job of its own, in a deployment that lives through all of them.

The steps are where tests/faults/steps.py puts its wires. Who dies is started again as systemd would, or as an operator
would who types `fedgrade stop` and `fedgrade resume`; a `fedgrade serve` that lost a process mends that by itself.
"""

import time
from dataclasses import dataclass

import pytest

from tests.faults.policies import plain, recovering, summed
from tests.faults.served import Served
from tests.faults.steps import (
    BEGINNING,
    RUN,
    RUN_STEPS,
    SERVE,
    SITE_STEPS,
    SUM_RUN_STEPS,
    SUM_SITE_STEPS,
    SUPEREXEC,
    SUPERLINK,
)
from tests.federation.small_federation import calibrate_once
from tests.federation.sum_partners import FIVE

pytestmark = [pytest.mark.slow, pytest.mark.flower]
SITES = FIVE[:4]  # the fewest of which a sum may do without one
SITE, OTHER = SITES[0], SITES[1]
PLAIN, SUMMED, RECOVERING = plain(len(SITES)), summed(len(SITES)), recovering(len(SITES))
COORDINATORS = (RUN, SUPERLINK, SUPEREXEC, SERVE)
DEADLINE_SECONDS = 30.0
# Where these steps are: everything else happens in the first training round.
FIRST, LAST = ("train", 0), ("evaluate", 0)
PLACES = {"shown the job": BEGINNING, "admitted it": BEGINNING, "model written": LAST, "model in the ledger": LAST}
# The charge is on disk and the reply is not: the next attempt is charged again. Where masks, or votes, are everybody's,
# it is charged by everybody.
LOST_REPLIES = {"charged", "committed to its ledger", "masked", "voted"}
VOTES = {"voted", "revealed", "votes in hand", "shares in hand"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Who dies, at which step of whose, in which kind of job."""

    kind: str
    watched: str
    step: str
    victim: str

    def __str__(self):
        return f"{self.kind}: {self.victim} at {self.watched}'s {self.step}"

    @property
    def place(self):
        return PLACES.get(self.step, FIRST)

    @property
    def spec(self):
        if self.kind == "plain":
            return PLAIN
        return RECOVERING if self.step in VOTES else SUMMED

    @property
    def twice(self):
        """Who pays for one stage twice."""
        if self.victim == OTHER and self.step == "all committed":
            # It forgot what it committed to before it was charged, and the others' charges came to nothing.
            return {site: 1 for site in SITES if site != OTHER}
        if self.victim != SITE or self.step not in LOST_REPLIES:
            return {}
        return {SITE: 1} if self.kind == "plain" else dict.fromkeys(SITES, 1)


def pairs():
    """Every one."""
    for kind, of_site, of_run in (("plain", SITE_STEPS, RUN_STEPS), ("sum", SUM_SITE_STEPS, SUM_RUN_STEPS)):
        for step in of_site:
            for victim in (SITE, *COORDINATORS):
                yield Pair(kind=kind, watched=SITE, step=step, victim=victim)
        for step in of_run:
            for victim in (*COORDINATORS, OTHER):
                yield Pair(kind=kind, watched=RUN, step=step, victim=victim)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.job.calibrate", calibrate_once)
        with Served(tmp_path_factory.mktemp("faults"), sites=SITES) as served:
            yield served


@pytest.fixture(scope="module")
def undisturbed(served):
    """Digest of the weights where nobody dies: the same whether sums are masked or not."""
    digests = set()
    for spec in (PLAIN, SUMMED, RECOVERING):
        job = served.federation.job(spec, nonce="undisturbed")
        outcome = served.outcome(job, served.finish(job, deadline_seconds=DEADLINE_SECONDS))
        assert (outcome.twice, outcome.unpaid, outcome.said) == ({}, 0, ())
        digests.add(outcome.weights)
    (weights,) = digests
    return weights


@pytest.fixture(scope="module")
def rows():
    """Lines of the table, as they are found."""
    return []


@pytest.mark.parametrize("pair", list(pairs()), ids=str)
def test_whoever_dies_the_job_ends_with_the_same_model_and_every_charge_is_accounted_for(
    served, undisturbed, rows, pair
):
    began = time.monotonic()
    job = served.federation.job(pair.spec, nonce=str(pair))
    wire = served.kill_at(pair.watched, pair.step, victim=pair.victim, place=pair.place)
    said = served.finish(job, deadline_seconds=DEADLINE_SECONDS)
    assert wire.exists(), said
    outcome = served.outcome(job, said)
    served.require_at_rest()
    again = sum(outcome.twice.values())
    rows.append(
        f"| {pair.kind} | {pair.watched}: {pair.step} | {pair.victim} | {outcome.unpaid} | {again} | "
        f"{'yes' if outcome.weights == undisturbed else 'no'} | {time.monotonic() - began:.0f} s |"
    )
    assert outcome.unpaid == 0
    assert outcome.twice == pair.twice, said
    assert outcome.weights == undisturbed, said


def test_a_run_that_is_killed_while_nobody_looks_is_taken_up_again_by_the_command_that_serves(served, undisturbed):
    job = served.federation.job(PLAIN, nonce="night")
    wire = served.kill_at(RUN, "replies in hand", place=FIRST)
    served.put(job, deadline_seconds=DEADLINE_SECONDS)
    # Whoever follows the run is told nothing but its end.
    served.once(deadline_seconds=DEADLINE_SECONDS, attended=False)
    assert wire.exists()
    outcome = served.outcome(job, ())
    assert (outcome.weights, outcome.twice, outcome.unpaid) == (undisturbed, {}, 0)
    assert "whose process was gone" in served.log("serve")
    served.require_at_rest()


def test_the_table_of_what_was_found(rows, publish):
    """The last test of the module writes down what the others saw."""
    assert rows
    setup = (
        f"{len(rows)} pairs, each in a job of its own (4 sites, 2 rounds, no noise), in one deployment: `fedgrade "
        "serve` and four nodes. *Lost*: receipts that were counted and that no ledger was charged for. *Again*: "
        "charges beyond one a site and stage. *Same model*: its weights are those of an undisturbed job, bit by bit."
    )
    head = ["| job | step | killed | lost | again | same model | time |", "|---|---|---|---|---|---|---|"]
    publish("faults", [setup, "", *head, *rows])
