"""A coordinator that dies at every step of a secure sum, sites restarted meanwhile or not: nobody pays for it twice.

What sites may have charged for is on disk before they are asked, so that a new process asks for it byte for byte.
"""

import pytest

from fedgrade.errors import SignatureRefused
from fedgrade.federation import rounds
from fedgrade.federation.messages import CommitRequest, ContributeRequest, RevealRequest, VoteRequest
from fedgrade.federation.rounds import RoundLog
from fedgrade.federation.store import RunStore
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.canonical import encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey
from tests.federation.small_federation import NAMES, SmallFederation
from tests.federation.sum_partners import FIVE, Noted, Partners, Wire, at, paid, summing
from tests.flow.test_coordinator_crash import PowerCut, power_cut

pytestmark = pytest.mark.usefixtures("quick")
SITE = NAMES[1]
ONE_ROUND = summing(minimum_sites=2)
RECOVERING = summing(minimum_sites=3, tolerate_dropouts=1)
EACH_ONCE = {("centre", 0): 1, ("train", 0): 1, ("evaluate", 0): 1}
# The second stage. An attempt is kept twice: when it is proposed, and when all have committed to it.
PROPOSED, COMMITTED, SECOND = 2, 3, 1
AFTER_VECTORS = [
    (rounds, "_advance", SECOND),
    (RunStore, "keep_receipts", SECOND),
    (RunStore, "save", SECOND),
    (RoundLog, "close_round", SECOND),
]
STEPS = [
    (owner, name, call, after)
    for owner, name, call in [(RunStore, "keep_sum", PROPOSED), (RunStore, "keep_sum", COMMITTED), *AFTER_VECTORS]
    for after in (False, True)
]


@pytest.fixture
def three(federation):
    with Partners.of(federation) as partners:
        yield partners


@pytest.fixture
def five(tmp_path):
    with Partners.of(SmallFederation.create(tmp_path / "five", names=FIVE)) as partners:
        yield partners


def finished(partners, job, wire):
    """The job, gone on with by a new process to its end; what was noted there."""
    federation = partners.federation
    with pytest.MonkeyPatch.context() as patch:
        noted = Noted(patch, wire)
        federation.run(job, wire)
    proof = verify_federation(federation.root, roster=federation.roster)
    assert len(proof.jobs[job.digest].rounds) == len(EACH_ONCE)
    return noted


@pytest.mark.parametrize("restarted", [False, True], ids=["site up", "site restarted"])
@pytest.mark.parametrize(
    "step", STEPS, ids=[f"{'after' if after else 'before'} {name} {call}" for _, name, call, after in STEPS]
)
def test_a_coordinator_that_dies_asks_for_the_same_again_and_no_site_pays_twice(three, step, restarted):
    owner, name, call, after = step
    federation, wire = three.federation, Wire(three)
    job = federation.job(ONE_ROUND)
    with power_cut(owner, name, call, after=after):
        federation.run(job, wire)
    if restarted:
        three.restart(SITE)
    noted = finished(three, job, wire)
    assert all(gathered.sites == NAMES for _, gathered in noted.gathered)
    # The one moment at which a restart costs the others a charge: all have committed, none has answered.
    lost = restarted and (name, call, after) == ("keep_sum", COMMITTED, True)
    others = {**EACH_ONCE, ("train", 0): 2} if lost else EACH_ONCE
    assert [paid(federation, site) for site in NAMES] == [others, EACH_ONCE, others]


@pytest.mark.parametrize("answered", [1, 2])
@pytest.mark.parametrize("restarted", [None, *NAMES[:2]])
def test_a_coordinator_that_dies_while_vectors_come_in_gets_the_others_afterwards(three, answered, restarted):
    federation = three.federation
    job, seen = federation.job(ONE_ROUND), []

    def cut(site, body, pass_on):
        if at(body, ContributeRequest, "train"):
            if len(seen) == answered:
                raise PowerCut
            seen.append(site)
        return pass_on()

    with pytest.raises(PowerCut):
        federation.run(job, Wire(three, cut))
    if restarted:
        three.restart(restarted)
    finished(three, job, Wire(three))
    # Who had answered resends; who had not, and lost its keys, makes a further attempt necessary.
    lost = restarted is not None and restarted not in seen
    assert paid(federation, NAMES[0]) == {**EACH_ONCE, ("train", 0): 1 + lost}
    assert paid(federation, NAMES[1])["train", 0] == 1


def test_attempts_that_a_dead_coordinator_had_only_proposed_do_not_stand_in_its_way(three):
    """It dies again and again before anybody can commit: numbers are used up, and nothing else."""
    federation = three.federation
    job = federation.job(ONE_ROUND)

    def cut(site, body, pass_on):
        reply = pass_on()
        if site == NAMES[2] and isinstance(body, CommitRequest):
            raise PowerCut
        return reply

    for _ in range(6):
        with pytest.raises(PowerCut):
            federation.run(job, Wire(three, cut))
    wire = Wire(three)
    noted = finished(three, job, wire)
    assert noted.gathered[0][0] == ("centre", 0, 6)
    assert wire.refusals() == []
    assert [paid(federation, site) for site in NAMES] == [EACH_ONCE] * 3


@pytest.mark.parametrize("kind", [VoteRequest, RevealRequest])
@pytest.mark.parametrize("place", [0, 4])
def test_with_recovery_a_coordinator_that_dies_among_votes_or_shares_goes_on_with_them(five, kind, place):
    federation = five.federation
    job = federation.job(RECOVERING)

    def cut(site, body, pass_on):
        reply = pass_on()
        if site == FIVE[place] and isinstance(body, kind):
            raise PowerCut
        return reply

    with pytest.raises(PowerCut):
        federation.run(job, Wire(five, cut))
    noted = finished(five, job, Wire(five))
    assert all(gathered.sites == FIVE for _, gathered in noted.gathered)
    assert [paid(federation, site) for site in FIVE] == [EACH_ONCE] * 5


def test_with_recovery_nobody_votes_for_a_second_set_after_the_coordinator_died(five):
    """The vector that was late before the crash is there after it; everybody voted for the set without it."""
    federation, late = five.federation, FIVE[2]
    job = federation.job(RECOVERING)

    def cut(site, body, pass_on):
        if site == late and isinstance(body, ContributeRequest):
            pass_on()
            return None
        if isinstance(body, RevealRequest):
            raise PowerCut
        return pass_on()

    with pytest.raises(PowerCut):
        federation.run(job, Wire(five, cut))
    wire = Wire(five)
    noted = finished(five, job, wire)
    assert noted.gathered[0][0] == ("centre", 0, 1)
    assert {code for _, code in wire.refusals()} == {"attempt"}
    assert all(gathered.sites == FIVE for _, gathered in noted.gathered)
    assert [paid(federation, site) for site in FIVE] == [{**EACH_ONCE, ("centre", 0): 2}] * 5


def test_a_begun_attempt_whose_commitments_verify_no_more_is_given_up(three):
    federation = three.federation
    job = federation.job(ONE_ROUND)
    with power_cut(RunStore, "keep_sum", COMMITTED, after=True):
        federation.run(job, Wire(three))
    begun = federation.store(job).begun_sum(job, purpose="train", round_index=0)
    forged = {site: envelope.replace("payload", "Payload") for site, envelope in begun.commitments.items()}
    federation.store(job).keep_sum(type(begun)(terms=begun.terms, commitments=forged))
    noted = finished(three, job, Wire(three))
    assert noted.gathered[0][0] == ("train", 0, 1)
    assert [paid(federation, site) for site in NAMES] == [EACH_ONCE] * 3


def by_nobody(begun):
    return encode(begun)


def by_another_key(begun):
    return seal(begun, SigningKey.generate())


@pytest.mark.parametrize("forge", [by_nobody, by_another_key])
def test_a_begun_attempt_that_the_coordinator_did_not_sign_is_refused_and_nobody_pays_for_it(three, forge):
    federation = three.federation
    job = federation.job(ONE_ROUND)
    with power_cut(RunStore, "keep_sum", COMMITTED, after=True):
        federation.run(job, Wire(three))
    begun = federation.store(job).begun_sum(job, purpose="train", round_index=0)
    kept = federation.root / "jobs" / job.digest[:16] / "checkpoint" / "sum.json"
    signed, before = kept.read_bytes(), [paid(federation, site) for site in NAMES]
    kept.write_bytes(forge(begun))
    with pytest.raises(SignatureRefused, match=r"attempt .*sum\.json: was not signed by this coordinator"):
        federation.run(job, Wire(three))
    assert [paid(federation, site) for site in NAMES] == before
    kept.write_bytes(signed)
    finished(three, job, Wire(three))
    assert [paid(federation, site) for site in NAMES] == [EACH_ONCE] * 3
