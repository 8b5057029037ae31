"""Whom the coordinator waits for, how long, and what it costs whoever comes back late."""

from dataclasses import replace

import pytest

from fedgrade.errors import RoundFailed
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.messages import Reply, Request, read_message, write_message
from tests.federation.meddling import LIAR, Meddled, refused, spent_once_admitted
from tests.federation.small_federation import DISTRIBUTED, NAMES, POLICY, SPEC, SmallFederation, with_privacy
from tests.federation.sum_partners import FIVE, SUMS, summing

pytestmark = pytest.mark.usefixtures("quiet")


class Clock:
    """Time that passes only in pauses; ``at(seconds)`` is called when they begin."""

    def __init__(self, monkeypatch, at=lambda _: None):
        self.now, self.at = 0.0, at
        for module in ("exchange", "turns"):
            monkeypatch.setattr(f"fedgrade.federation.{module}.time", self)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.at(self.now)
        self.now += seconds


class Paused:
    """A cohort in which a question to one of ``away()`` never arrives."""

    def __init__(self, sites, away):
        self.inner, self.away, self.asked = InProcessCohort(sites=sites), away, []

    def ask(self, requests, *, deadline_seconds):
        self.asked.append((frozenset(requests), deadline_seconds))
        here = {site: raw for site, raw in requests.items() if site not in self.away()}
        return self.inner.ask(here, deadline_seconds=deadline_seconds)


PAUSED = NAMES[0]


@pytest.fixture
def needing_all(federation):
    return federation.job(replace(SPEC, aggregation=replace(SPEC.aggregation, minimum_sites=len(NAMES))))


@pytest.mark.parametrize("began", [0, 4], ids=["at admission", "in a round"])
def test_a_site_that_the_job_needs_may_be_paused_for_most_of_the_deadline(federation, needing_all, monkeypatch, began):
    """Who is offline or paused is known at once: without pauses, three questions would be three silences."""
    clock, watched = Clock(monkeypatch), []
    with federation.answers() as answers:
        cohort = Paused(answers, lambda: {PAUSED} if len(cohort.asked) >= began and clock.now < 550.0 else ())
        federation.run(needing_all, cohort, deadline_seconds=600.0, watch=watched.append)
    assert federation.release(needing_all).release.contributions == dict.fromkeys(NAMES, 4)
    # Each stage is charged once, and whoever watches is told all the time who is missing.
    assert len(federation.charges(PAUSED)) == 4
    assert watched[0] == [PAUSED]
    assert len(watched) >= 550
    # It is not flooded: some dozen questions in nine minutes.
    assert sum(sites == {PAUSED} for sites, _ in cohort.asked) <= 30


def test_a_site_that_stays_away_ends_the_stage_at_its_deadline_and_is_named(federation, needing_all, monkeypatch):
    clock = Clock(monkeypatch)
    with federation.answers() as answers:
        cohort = Paused(answers, lambda: {PAUSED} if len(cohort.asked) > 1 else ())
        with pytest.raises(RoundFailed, match=f"centre round 0: 2 sites answered, .* is 3; {PAUSED} did not answer$"):
            federation.run(needing_all, cohort, deadline_seconds=600.0)
    assert 550.0 < clock.now <= 600.0
    assert all(0 < seconds <= 600.0 for _, seconds in cohort.asked)


def test_nobody_waits_for_a_site_that_was_revoked(federation, needing_all, monkeypatch):
    gone = set()
    clock = Clock(monkeypatch, at=lambda now: gone.update({PAUSED} if now >= 30.0 else ()))
    with federation.answers() as answers:
        cohort = Paused(answers, lambda: {PAUSED})
        with pytest.raises(RoundFailed, match=f"{PAUSED} was revoked; without who was revoked this job cannot go on$"):
            federation.run(needing_all, cohort, deadline_seconds=600.0, revoked=lambda: gone)
    assert clock.now < 32.0


def test_a_site_that_says_spent_is_asked_for_three_attempts_however_long_another_is_waited_for(
    federation, needing_all, monkeypatch
):
    """Each attempt may be charged."""
    Clock(monkeypatch)

    with federation.answers() as answers:
        meddled = Meddled(answers, spent_once_admitted(federation))
        cohort = Paused({}, lambda: {PAUSED} if len(cohort.asked) > 1 else ())
        cohort.inner = meddled
        with pytest.raises(RoundFailed, match="did not answer"):
            federation.run(needing_all, cohort, deadline_seconds=600.0)
    # Admission, and three attempts of the first stage.
    assert sum(LIAR in asked for asked in meddled.asked) == 1 + 3
    assert len(federation.charges(LIAR)) <= 3


def once(federation, code):
    """A site that, after admission, refuses a single time; ``said`` tells whether it has."""
    said = []

    def meddle(site, raw, reply):
        if site != LIAR or said or federation.opened(reply, name=LIAR).document.body.kind == "admitted":
            return reply
        said.append(code)
        return refused(federation, raw, code)

    return meddle, said


@pytest.mark.parametrize("away", [0.5, 2.0, 30.0])
def test_a_site_that_comes_back_late_and_had_its_reply_lost_is_charged_for_one_more_attempt(
    federation, needing_all, monkeypatch, away
):
    clock = Clock(monkeypatch)
    meddle, said = once(federation, "spent")
    with federation.answers() as answers:
        cohort = Paused({}, lambda: {LIAR} if len(cohort.asked) > 1 and clock.now < away else ())
        cohort.inner = Meddled(answers, meddle)
        federation.run(needing_all, cohort, deadline_seconds=600.0)
    assert said
    assert federation.release(needing_all).release.contributions[LIAR] == 4
    assert clock.now < away + 10.0


def test_a_site_that_could_not_just_now_and_is_started_again_is_waited_for(federation, needing_all, monkeypatch):
    clock = Clock(monkeypatch)
    meddle, said = once(federation, "ledger")
    with federation.answers() as answers:
        cohort = Paused({}, lambda: {LIAR} if said and clock.now < 30.0 else ())
        cohort.inner = Meddled(answers, meddle)
        federation.run(needing_all, cohort, deadline_seconds=600.0)
    assert federation.release(needing_all).release.contributions == dict.fromkeys(NAMES, 4)
    assert len(federation.charges(LIAR)) == 4


class Staged(Paused):
    """``away(stage, kind)`` is asked with the stage, a purpose and a round, and the kind of the question under way."""

    def __init__(self, federation, sites, away):
        self.stage, self.kind = None, None
        super().__init__(sites, lambda: away(self.stage, self.kind))
        self._coordinator = federation.roster.coordinator

    def ask(self, requests, *, deadline_seconds):
        raw = next(iter(requests.values()))
        body = read_message(raw, as_=Request, signed_by=self._coordinator).document.body
        self.kind = body.kind
        if body.kind == "contribute":
            self.stage = (body.purpose, body.round_index)
        elif body.kind == "commit":
            self.stage = (body.proposal.terms.task.purpose, body.proposal.terms.task.round_index)
        return super().ask(requests, deadline_seconds=deadline_seconds)


SUMMING = replace(POLICY, modes=(*POLICY.modes, "distributed"))


@pytest.mark.parametrize("away", [20.0, 250.0])
def test_who_is_away_while_the_others_have_paid_for_a_sum_is_waited_for_and_nobody_pays_again(
    federation, monkeypatch, away
):
    """Two of three would do for the job, but this attempt is over without the third."""
    clock, job, gone = Clock(monkeypatch), federation.job(DISTRIBUTED), []

    def paused(stage, kind):
        if (stage, kind) == (("train", 0), "contribute"):
            gone.append(clock.now)
        return {PAUSED} if gone and clock.now < gone[0] + away else ()

    with federation.answers(policy=SUMMING) as answers:
        federation.run(job, Staged(federation, answers, paused), deadline_seconds=600.0)
    stages = {len(federation.charges(name)) for name in NAMES}
    assert stages == set(federation.release(job).release.contributions.values())
    assert len(stages) == 1
    assert away <= clock.now < 2 * away


@pytest.mark.parametrize("missing", [1, 2])
def test_a_sum_that_does_without_one_waits_for_nobody_where_one_is_away_and_where_two_are_for_both(
    tmp_path, monkeypatch, missing
):
    federation = SmallFederation.create(tmp_path / "five", names=FIVE)
    clock, gone = Clock(monkeypatch), []

    def away(stage, kind):
        if (stage, kind) == (("train", 0), "contribute"):
            gone.append(clock.now)
        return set(FIVE[:missing]) if gone and clock.now < gone[0] + 20.0 else ()

    job = federation.job(summing(minimum_sites=3, tolerate_dropouts=1))
    with federation.answers(policy=SUMS) as answers:
        federation.run(job, Staged(federation, answers, away), deadline_seconds=600.0)
    contributions = federation.release(job).release.contributions
    assert contributions[FIVE[4]] == 3
    # Whoever came back pays once, as everybody; whoever was done without is not asked in the stage that follows.
    assert contributions[FIVE[0]] == (3 if missing == 2 else 1)
    assert all(len(federation.charges(name)) == contributions[name] for name in FIVE)
    assert (clock.now >= 20.0) == (missing == 2)


@pytest.mark.parametrize("answered", [False, True], ids=["that is silent", "that has answered"])
@pytest.mark.parametrize("revoked_first", [False, True])
def test_a_revocation_in_mid_sum_neither_ends_the_job_nor_has_anybody_pay_for_an_attempt_that_is_over(
    federation, monkeypatch, answered, revoked_first
):
    """One of three is revoked while another, which the job needs, is away for a while."""
    revoked, began = set(), []
    clock, job = Clock(monkeypatch), federation.job(DISTRIBUTED)
    gone, other, third = NAMES

    def strike(now):
        if began and now >= began[0] + (0.0 if revoked_first else 5.0):
            revoked.add(gone)

    def away(stage, kind):
        if (stage, kind) == (("train", 0), "contribute"):
            began.append(clock.now)
        silent = {other} if began and clock.now < began[0] + 20.0 else set()
        return silent | ({gone} if began and not answered else set())

    clock.at = strike
    with federation.answers(policy=SUMMING) as answers:
        cohort = Staged(federation, answers, away)
        federation.run(job, cohort, deadline_seconds=600.0, revoked=lambda: revoked)
    contributions = federation.release(job).release.contributions
    assert (contributions[other], contributions[third]) == (4, 4)
    assert len(federation.charges(other)) == 4
    # The third had answered before anybody was revoked; only a total that counts the revoked one's answer spares it.
    assert len(federation.charges(third)) == (4 if answered else 5)
    assert len(federation.charges(gone)) == contributions[gone]
    assert clock.now < 40.0


@pytest.mark.parametrize("kind", ["vote", "reveal"])
def test_whoever_declines_in_mid_sum_helps_no_more_to_open_it(tmp_path, monkeypatch, kind):
    federation = SmallFederation.create(tmp_path / "five", names=FIVE)
    asking, late = replace(SUMS, approval=True), FIVE[0]
    job, replies, over = federation.job(summing(minimum_sites=3, tolerate_dropouts=1)), [], []

    def decline(stage, asked):
        if (stage, asked) == (("train", 0), kind) and not over:
            federation.approvals(late).decide(job, "declined")
            over.append(stage)
        return ()

    Clock(monkeypatch)
    with federation.answers(policy=asking) as answers:
        for name in FIVE:
            answers[name](federation.admission(job, name=name))
            federation.approvals(name).decide(job, "approved")

        def said(raw):
            reply = answers[late](raw)
            return reply, read_message(reply, as_=Reply, signed_by=federation.roster.key_of(late)).document.body

        def heard(raw):
            if over:
                # Whatever job the coordinator says that it is about.
                document = read_message(raw, as_=Request, signed_by=federation.roster.coordinator).document
                other = write_message(replace(document, job="f" * 64), tensors=b"", key=federation.coordinator_key)
                assert said(other)[1].kind == "refusal"
            reply, body = said(raw)
            replies.extend([body] if over else [])
            return reply

        cohort = Staged(federation, {**answers, late: heard}, decline)
        federation.run(job, cohort, deadline_seconds=600.0)
    assert replies
    assert {(reply.kind, reply.code) for reply in replies} == {("refusal", "policy")}
    contributions = federation.release(job).release.contributions
    assert contributions[FIVE[4]] == 3
    assert contributions.get(late, 0) < 3


def test_who_does_not_come_back_to_a_sum_costs_its_phase_of_the_deadline_and_the_others_one_more_charge(
    federation, monkeypatch
):
    clock, job, gone = Clock(monkeypatch), federation.job(DISTRIBUTED), []

    def away(stage, kind):
        gone.extend([PAUSED] if (stage, kind) == (("train", 0), "contribute") else [])
        return set(gone)

    with federation.answers(policy=SUMMING) as answers:
        federation.run(job, Staged(federation, answers, away), deadline_seconds=600.0)
    contributions = federation.release(job).release.contributions
    assert 250.0 < clock.now <= 310.0
    for name in set(NAMES) - {PAUSED}:
        assert len(federation.charges(name)) == contributions[name] + 1


@pytest.mark.parametrize("summed", [False, True], ids=["each alone", "in a secure sum"])
def test_a_site_that_rested_takes_the_place_of_one_that_is_away(federation, monkeypatch, summed):
    """Two of three are enough; one misses a stage and rests, and is back when another goes away."""
    clock = Clock(monkeypatch)
    job = federation.job(DISTRIBUTED if summed else with_privacy(rounds=1))
    first, second, third = NAMES
    away = {("centre", 0): {third}, ("train", 0): {second}}
    with federation.answers(policy=SUMMING) as answers:
        cohort = Staged(federation, answers, lambda stage, _: away.get(stage, ()))
        federation.run(job, cohort, deadline_seconds=600.0)
    assert clock.now < 10.0
    contributions = federation.release(job).release.contributions
    assert contributions[third] >= 1
    assert contributions[first] > contributions[second]
