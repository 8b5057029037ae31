"""What the coordinator believes: nothing that does not verify, and nothing that answers another question."""

from dataclasses import replace

import numpy as np
import pytest

from fedgrade.errors import RoundFailed
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.messages import Contribution, Refusal, Reply, write_message
from fedgrade.federation.payloads import largest_release, release_size
from fedgrade.federation.verification import verify_federation
from fedgrade.job import plan_job
from fedgrade.model.weights import write_weights
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import seal
from fedgrade.trust.ledger import Entry, open_receipt
from tests.federation.meddling import HONEST, LIAR, Meddled, liar_alone, run, spent_once_admitted, trained_without
from tests.federation.small_federation import DECLARED, LOCAL_SGD, NAMES, POLICY, with_privacy

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def job(federation):
    return federation.job(with_privacy(rounds=1))


def forged(federation, reply, tensors, **changes):
    """The liar's reply around other arrays, with a receipt that vouches for them: its key signs anything."""
    document = federation.opened(reply, name=LIAR).document
    if not isinstance(document.body, Contribution):
        return reply
    key = federation.site_keys[LIAR]
    entry = open_receipt(document.body.receipt.encode(), key=key.public)
    commit = replace(entry.body, message_digest=digest(tensors))
    receipt = seal(Entry(sequence=entry.sequence, previous=entry.previous, time=entry.time, body=commit), key)
    body = replace(document.body, receipt=receipt.decode(), **changes)
    return write_message(replace(document, body=body, tensors_digest=digest(tensors)), tensors=tensors, key=key)


def test_silence_costs_only_the_silent(federation, job):
    trained_without(federation, job, liar_alone(lambda *_: None))


def test_a_silent_site_is_asked_again_with_the_same_bytes(federation, job):
    cohort = run(federation, job, liar_alone(lambda *_: None))
    admissions = [asked[LIAR] for asked in cohort.asked if LIAR in asked]
    assert len(admissions) == 3
    assert len(set(admissions)) == 1


def test_a_site_whose_replies_are_lost_on_the_way_is_charged_once(federation, job):
    heard = set()

    def lose_the_first(request, reply):
        lost = request not in heard
        heard.add(request)
        return None if lost else reply

    run(federation, job, liar_alone(lose_the_first))
    assert len(federation.charges(LIAR)) == 3
    assert federation.release(job).release.contributions == dict.fromkeys(NAMES, 3)


def test_too_few_answers_end_the_round_and_say_so(federation, job):
    def two_silent(site, _, reply):
        return reply if site == NAMES[0] else None

    with pytest.raises(
        RoundFailed,
        match=r"admission: 1 sites answered, aggregation.minimum_sites is 2; recycler-b, recycler-c did not answer",
    ):
        run(federation, job, two_silent)


def test_a_site_that_was_silent_is_not_waited_for_in_the_next_stage_and_asked_again_after_it(federation):
    job = federation.job(with_privacy(rounds=3))

    def silent_in_the_first_round(site, request, reply):
        del request
        return None if site == LIAR and _place(federation, reply) == ("train", 0) else reply

    cohort = run(federation, job, silent_in_the_first_round)
    assert federation.release(job).release.contributions == {NAMES[0]: 5, NAMES[1]: 5, LIAR: 3}
    # Admission, the centre; the round in which it was silent, asked thrice; one without it; one with it, evaluation.
    assert [LIAR in asked for asked in cohort.asked] == [True, True, True, True, True, False, True, True]
    verify_federation(federation.root)


def _place(federation, reply):
    body = federation.opened(reply, name=LIAR).document.body
    return (body.purpose, body.round_index) if isinstance(body, Contribution) else ("", 0)


def _purpose(federation, reply):
    return _place(federation, reply)[0]


def test_refusals_are_named_when_too_few_remain(federation):
    with (
        federation.site(NAMES[0]) as first,
        federation.site(NAMES[1], policy=replace(POLICY, maximum_rounds=1)) as second,
        federation.site(NAMES[2], policy=replace(POLICY, epsilon_per_job=1.0)) as third,
    ):
        answers = dict(zip(NAMES, (first.answer, second.answer, third.answer), strict=True))
        with pytest.raises(RoundFailed, match=r"recycler-b refused \(policy\).*recycler-c refused \(policy\)"):
            federation.run(federation.job(), InProcessCohort(sites=answers))
    assert federation.charges(NAMES[0]) == []


def test_a_site_that_refuses_is_not_asked_again(federation, job):
    def refuse(request, _):
        body = Refusal(code="policy", reason="not today")
        reply = Reply(site=LIAR, request_digest=digest(request), body=body, tensors_digest=digest(b""))
        return write_message(reply, tensors=b"", key=federation.site_keys[LIAR])

    cohort = run(federation, job, liar_alone(refuse))
    assert sum(LIAR in asked for asked in cohort.asked) == 1


@pytest.mark.parametrize("often", [1, 100])
def test_a_site_whose_disk_is_full_is_asked_again_in_every_stage(federation, job, often):
    left = iter(range(often))

    def full(request, reply):
        if _purpose(federation, reply) != "train" or next(left, None) is None:
            return reply
        body = Refusal(code="ledger", reason="No space left on device")
        document = Reply(site=LIAR, request_digest=digest(request), body=body, tensors_digest=digest(b""))
        return write_message(document, tensors=b"", key=federation.site_keys[LIAR])

    run(federation, job, liar_alone(full))
    assert federation.release(job).release.contributions[LIAR] == (3 if often == 1 else 2)
    verify_federation(federation.root)


@pytest.mark.parametrize("code", ["policy", "budget", "data", "malformed", "model", "stale"])
def test_any_other_refusal_puts_a_site_out(federation, job, code):
    def refuse(request, _):
        body = Refusal(code=code, reason="no")
        reply = Reply(site=LIAR, request_digest=digest(request), body=body, tensors_digest=digest(b""))
        return write_message(reply, tensors=b"", key=federation.site_keys[LIAR])

    cohort = run(federation, job, liar_alone(refuse))
    assert sum(LIAR in asked for asked in cohort.asked) == 1


def test_a_site_that_says_spent_for_ever_is_given_up(federation, job):
    trained_without(federation, job, spent_once_admitted(federation))


@pytest.mark.parametrize(
    "garbage", [b"", b"FGM1", b"\xff" * 1000, b'{"payload": 1}', "later"], ids=["none", "magic", "noise", "json", "cut"]
)
def test_garbage_counts_as_silence(federation, job, garbage):
    trained_without(federation, job, liar_alone(lambda _, reply: reply[:-1] if garbage == "later" else garbage))


def test_a_reply_by_someone_else_counts_as_silence(federation, job):
    def borrowed(_, reply):
        document = federation.opened(reply, name=LIAR).document
        return write_message(document, tensors=b"", key=federation.site_keys[NAMES[0]])

    trained_without(federation, job, liar_alone(borrowed))


def test_a_reply_in_another_site_s_name_counts_as_silence(federation, job):
    def renamed(_, reply):
        opened = federation.opened(reply, name=LIAR)
        return write_message(
            replace(opened.document, site=NAMES[0]), tensors=opened.tensors, key=federation.site_keys[LIAR]
        )

    trained_without(federation, job, liar_alone(renamed))


def test_a_reply_to_an_earlier_question_counts_as_silence(federation, job):
    first = {}
    run(federation, job, liar_alone(lambda _, reply: first.setdefault("reply", reply)))
    assert set(federation.release(job).release.contributions) == set(HONEST)


def test_a_reply_nobody_asked_for_is_ignored(federation, job):
    class Chatty(Meddled):
        def ask(self, requests, *, deadline_seconds):
            replies = super().ask(requests, deadline_seconds=deadline_seconds)
            return {**replies, "stranger": b"hello", **{name: b"" for name in NAMES if name not in requests}}

    with federation.answers() as answers:
        federation.run(job, Chatty(answers, lambda _, __, reply: reply))
    verify_federation(federation.root)


def _other_arrays(federation, job, reply):
    opened = federation.opened(reply, name=LIAR)
    if not isinstance(opened.document.body, Contribution):
        return reply
    size = release_size(job, opened.document.body.purpose)
    tensors = write_weights({"release": np.zeros(size, dtype=np.int64)}, metadata={})
    document = replace(opened.document, tensors_digest=digest(tensors))
    return write_message(document, tensors=tensors, key=federation.site_keys[LIAR])


def test_a_receipt_for_other_bytes_does_not_count(federation, job):
    trained_without(federation, job, liar_alone(lambda _, reply: _other_arrays(federation, job, reply)))


@pytest.mark.parametrize(
    "changes", [{"round_index": 5}, {"attempt": 1}, {"purpose": "evaluate"}, {"receipt": "{}"}, {"receipt": "\n"}]
)
def test_a_contribution_that_its_receipt_does_not_fit_does_not_count(federation, changes):
    job = federation.job(with_privacy(rounds=1))

    def misfit(_, reply):
        opened = federation.opened(reply, name=LIAR)
        if not isinstance(opened.document.body, Contribution):
            return reply
        body = replace(opened.document.body, **changes)
        return write_message(
            replace(opened.document, body=body), tensors=opened.tensors, key=federation.site_keys[LIAR]
        )

    run(federation, job, liar_alone(misfit))
    # Where the change says what was so already, the contribution stands.
    assert federation.release(job).release.contributions.get(LIAR, 0) <= ("purpose" in changes)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 2**62])
def test_numbers_that_no_honest_site_sends_do_not_count(federation, job, number):
    def extreme(_, reply):
        purpose = _purpose(federation, reply) or "centre"
        array = np.full(release_size(job, purpose), number, dtype=np.int64)
        return forged(federation, reply, write_weights({"release": array}, metadata={}))

    trained_without(federation, job, liar_alone(extreme))


def test_a_liar_within_the_bound_moves_the_model_and_breaks_nothing(federation, job):
    def loud(_, reply):
        purpose = _purpose(federation, reply) or "centre"
        array = np.full(release_size(job, purpose), largest_release(job, purpose, site=LIAR), dtype=np.int64)
        return forged(federation, reply, write_weights({"release": array}, metadata={}))

    run(federation, job, liar_alone(loud))
    assert np.isfinite(federation.release(job).head.thresholds).all()


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e30])
def test_an_update_that_is_no_number_does_not_count(federation, number):
    job = federation.job(LOCAL_SGD)

    def poisoned(_, reply):
        if _purpose(federation, reply) != "train":
            return reply
        half = write_weights({"update": np.full(release_size(job, "train"), 0.5)}, metadata={})
        return forged(federation, reply, half.replace(np.float64(0.5).tobytes(), np.float64(number).tobytes(), 1))

    run(federation, job, liar_alone(poisoned), policy=replace(POLICY, modes=("local", "local_sgd")))
    contributions = federation.release(job).release.contributions
    assert contributions == {NAMES[0]: 4, NAMES[1]: 4, LIAR: 2}
    assert np.isfinite(federation.release(job).head.thresholds).all()


def test_sites_that_dropped_out_are_not_divided_for(federation, job):
    """Without the third site, the model is the one that two sites alone would have trained."""
    without = trained_without(federation, job, liar_alone(lambda *_: None))
    two = plan_job(job.spec, declared_items=dict.fromkeys(HONEST, DECLARED), nonce="two")
    with federation.answers() as answers:
        federation.run(two, InProcessCohort(sites=answers))
    assert federation.release(two).release.weights_digest == without.weights_digest
