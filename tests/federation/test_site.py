import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgrade.federation import messages
from fedgrade.federation.messages import Admitted, Contribution, Refusal
from fedgrade.federation.payloads import Head, write_head
from fedgrade.federation.releases import SiteRows
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import SigningKey
from fedgrade.trust.ledger import open_receipt
from fedgrade.trust.records import Commit
from tests.federation.small_federation import (
    NAMES,
    POLICY,
    ProjectedPhotos,
    SmallFederation,
    ask,
    refusal,
    told,
    zero_head,
)

SITE = NAMES[0]
pytestmark = pytest.mark.usefixtures("quiet")


def test_a_message_by_someone_else_is_refused(federation, job):
    stranger = SmallFederation(
        root=federation.root, roster=federation.roster, coordinator_key=SigningKey.generate(), site_keys={}
    )
    with federation.site() as site:
        code, _ = refusal(federation, site, stranger.admission(job))
    assert code == "malformed"


def test_a_request_for_another_site_is_refused(federation, admitted, job):
    code, reason = refusal(federation, admitted, federation.question(job, ask("centre"), name=NAMES[1]))
    assert (code, reason) == ("stale", "message for recycler-b; this is recycler-a")


def test_a_job_that_was_never_admitted_gets_nothing(federation, admitted):
    code, reason = refusal(federation, admitted, federation.question(federation.job(nonce="other"), ask("centre")))
    assert code == "stale"
    assert "never admitted" in reason


def test_an_answer_is_charged_before_and_its_receipt_names_the_bytes_that_left(federation, admitted, job):
    reply = federation.opened(admitted.answer(federation.question(job, ask("centre"))))
    assert isinstance(reply.document.body, Contribution)
    reserve, commit = [entry.body for entry in federation.entries(SITE)[-2:]]
    receipt = open_receipt(reply.document.body.receipt.encode(), key=federation.roster.key_of(SITE)).body
    assert receipt == commit
    assert isinstance(commit, Commit)
    assert commit.message_digest == digest(reply.tensors)
    assert reserve.mechanism == job.plan.centre
    assert reserve.weights_digest == digest(zero_head(job))


def test_photos_are_read_after_the_reservation_and_never_before(federation, job):
    photos = ProjectedPhotos(root=federation.folder(SITE) / "photos")
    with federation.site(photos=photos) as site:
        site.answer(federation.admission(job))
        photos.opened.clear()
        refusal(federation, site, federation.question(job, ask("train", 7)))
        assert photos.opened == []
        site.answer(federation.question(job, ask("train", 0)))
    assert photos.opened


def test_evaluation_reads_held_out_photos_and_charges_their_own_account(federation, job):
    photos = ProjectedPhotos(root=federation.folder(SITE) / "photos")
    with federation.site(photos=photos) as site:
        site.answer(federation.admission(job))
        photos.opened.clear()
        site.answer(federation.question(job, ask("evaluate")))
    assert federation.charges(SITE)[-1].partition == "test"
    held_out = {photo for photo in photos.opened if int(photo[:4]) % 4 >= 2}
    assert held_out == set(photos.opened)


def test_the_same_request_again_gets_the_same_bytes_and_costs_nothing(federation, admitted, job):
    question = federation.question(job, ask("centre"))
    first = admitted.answer(question)
    before = federation.ledger(SITE).read_bytes()
    assert admitted.answer(question) == first
    assert federation.ledger(SITE).read_bytes() == before


def test_a_resend_survives_a_restart(federation, job):
    question = federation.question(job, ask("centre"))
    with federation.site() as site:
        site.answer(federation.admission(job))
        first = site.answer(question)
    before = federation.ledger(SITE).read_bytes()
    with federation.site() as site:
        assert site.answer(question) == first
    assert federation.ledger(SITE).read_bytes() == before


def test_the_same_round_with_other_weights_is_refused_as_charged(federation, admitted, job):
    shape = job.head_shape()
    other = write_head(Head(thresholds=np.ones(shape), centre=np.zeros(shape[1] - 1)))
    admitted.answer(federation.question(job, ask("train")))
    code, reason = refusal(federation, admitted, federation.question(job, ask("train"), tensors=other))
    assert code == "spent"
    assert "ask for attempt 1" in reason


@pytest.mark.parametrize(
    ("later", "earlier"),
    [
        (ask("train", 1), ask("train", 0)),
        (ask("train", 0), ask("centre")),
        (ask("evaluate"), ask("train", 1)),
        (ask("train", 1), ask("train", 0, 2)),
    ],
)
def test_an_earlier_round_after_a_later_one_is_stale(federation, admitted, job, later, earlier):
    admitted.answer(federation.question(job, later))
    code, reason = refusal(federation, admitted, federation.question(job, earlier))
    assert code == "stale"
    assert "moved on" in reason


def test_further_attempts_are_charged_and_the_policy_ends_them(federation, admitted, job):
    for attempt in range(POLICY.maximum_attempts):
        body = told(federation, admitted, federation.question(job, ask("centre", 0, attempt)))
        assert isinstance(body, Contribution)
    assert len(federation.charges(SITE)) == POLICY.maximum_attempts
    code, reason = refusal(federation, admitted, federation.question(job, ask("centre", 0, POLICY.maximum_attempts)))
    assert code == "stale"
    assert "policy.maximum_attempts is 3" in reason


@pytest.mark.parametrize(
    "question", [ask("train", 2), ask("train", -1), ask("centre", 1), ask("evaluate", 1), ask("train", 0, -1)]
)
def test_a_round_that_the_plan_does_not_have_is_refused(federation, admitted, job, question):
    code, reason = refusal(federation, admitted, federation.question(job, question))
    assert code == "stale"
    assert "no such round" in reason


def _trap(job, number):
    raw = write_head(Head(thresholds=np.full(job.head_shape(), 0.5), centre=np.zeros(job.head_shape()[1] - 1)))
    return raw.replace(np.float64(0.5).tobytes(), np.float64(number).tobytes(), 1)


@pytest.mark.parametrize(
    "weights",
    [
        lambda job: _trap(job, np.nan),
        lambda job: _trap(job, np.inf),
        lambda job: _trap(job, 1e30),
        lambda job: write_head(Head(thresholds=np.zeros((9, 9)), centre=np.zeros(job.head_shape()[1] - 1))),
        lambda job: zero_head(job) + bytes(8),
        lambda job: zero_head(job)[:100],
        lambda _: b"",
    ],
)
def test_trap_weights_are_refused_without_a_charge(federation, admitted, job, weights):
    code, _ = refusal(federation, admitted, federation.question(job, ask("train"), tensors=weights(job)))
    assert code == "model"


def test_a_message_above_the_limit_is_refused_without_a_charge(federation, admitted, job, monkeypatch):
    question = federation.question(job, ask("train"))
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", len(question) - 1)
    code, reason = refusal(federation, admitted, question)
    assert code == "stale"
    assert "the limit is" in reason


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_no_damaged_message_gets_more_than_a_signed_refusal(federation, admitted, job, data):
    question = federation.question(job, ask("train"))
    kind = data.draw(st.sampled_from(["cut", "flip", "noise", "length"]))
    position = data.draw(st.integers(min_value=0, max_value=min(len(question), 4000) - 1))
    match kind:
        case "cut":
            raw = question[:position]
        case "flip":
            raw = question[:position] + bytes([question[position] ^ data.draw(st.integers(1, 255))]) + question[
                position + 1 :
            ]  # fmt: skip
        case "noise":
            raw = data.draw(st.binary(max_size=500))
        case _:
            raw = question[:4] + data.draw(st.binary(min_size=4, max_size=4)) + question[8:]
            raw = raw if raw != question else b""
    refusal(federation, admitted, raw)


def test_a_broken_extractor_is_reported_without_details_and_its_charge_stands(federation, job, caplog):
    class Broken(ProjectedPhotos):
        def features(self, model, photos, view):
            if self.opened:
                raise RuntimeError("cell-0042.png is a B7")
            return super().features(model, photos, view)

    with federation.site(photos=Broken(root=federation.folder(SITE) / "photos")) as site:
        site.answer(federation.admission(job))
        with caplog.at_level(logging.ERROR):
            body = told(federation, site, federation.question(job, ask("train")))
    assert body == Refusal(code="malformed", reason="this site's own operator can see why in its log")
    assert "cell-0042" in caplog.text
    assert [entry.body.kind for entry in federation.entries(SITE)[-2:]] == ["reserve", "abort"]


def test_the_lifetime_budget_holds_across_jobs_and_restarts(federation):
    policy = replace(POLICY, epsilon_limit=60.0)
    one, two = federation.job(nonce="1"), federation.job(nonce="2")
    with federation.site(policy=policy) as site:
        site.answer(federation.admission(one))
        for question in (ask("centre"), ask("train", 0), ask("train", 1)):
            assert isinstance(told(federation, site, federation.question(one, question)), Contribution)
    with federation.site(policy=policy) as site:
        code, reason = refusal(federation, site, federation.admission(two))
    assert code == "budget"
    assert "ceiling is 60.00" in reason


def test_two_jobs_admitted_together_cannot_spend_more_than_the_ceiling(federation):
    policy = replace(POLICY, epsilon_limit=60.0)
    jobs = [federation.job(nonce=str(number)) for number in range(3)]
    with federation.site(policy=policy) as site:
        for job in jobs:
            assert isinstance(told(federation, site, federation.admission(job)), Admitted)
        codes = [
            told(federation, site, federation.question(job, ask("train", number))).kind
            for number in range(2)
            for job in jobs
        ]
    assert codes.count("refusal") > 0
    spent = len(federation.charges(SITE))
    assert spent == codes.count("contribution")


def test_a_lowered_ceiling_goes_on_record_even_between_two_rounds(federation, job):
    lower = replace(POLICY, epsilon_limit=50.0)
    with federation.site() as site:
        site.answer(federation.admission(job))
        site.answer(federation.question(job, ask("centre")))
    with federation.site(policy=lower) as site:
        assert isinstance(told(federation, site, federation.question(job, ask("train"))), Contribution)
    kinds = [entry.body.kind for entry in federation.entries(SITE)]
    assert kinds == ["genesis", "dataset", "plan", "checkpoint", "reserve", "commit", "dataset", "reserve", "commit"]
    assert [float(body.epsilon_limit) for body in federation.charges(SITE)] == [100.0, 50.0]


def test_a_ceiling_below_what_is_spent_stops_the_job_where_it_stands(federation, job):
    with federation.site() as site:
        site.answer(federation.admission(job))
        site.answer(federation.question(job, ask("centre")))
        site.answer(federation.question(job, ask("train")))
    before = len(federation.charges(SITE))
    with federation.site(policy=replace(POLICY, epsilon_limit=20.0)) as site:
        body = told(federation, site, federation.question(job, ask("train", 1)))
    assert body.code == "budget"
    assert len(federation.charges(SITE)) == before


def test_what_is_sensitive_does_not_print():
    rows = SiteRows(features=np.zeros((1, 2)), item_index=np.zeros(1, dtype=np.int64), grades=np.zeros(1, np.int64))
    assert repr(rows) == "SiteRows(<sensitive>)"
