"""What a site checks before it takes part in a job, and what it puts on record."""

from base64 import b64encode
from dataclasses import replace

import pytest

from fedgrade.federation import messages
from fedgrade.federation.messages import Admitted, Contribution, Request
from fedgrade.job import TrainingJob, plan_job
from fedgrade.trust.canonical import digest, encode
from fedgrade.trust.envelope import payload_type, pre_authentication_encoding, seal
from fedgrade.trust.identity import SigningKey
from fedgrade.trust.records import Checkpoint, DatasetOpened, PlanAccepted
from tests.federation.small_federation import (
    DECLARED,
    NAMES,
    POLICY,
    SCALE,
    SPEC,
    ask,
    refusal,
    refusal_and_log,
    told,
    with_privacy,
)

SITE = NAMES[0]
pytestmark = pytest.mark.usefixtures("quiet")


def test_admission_puts_the_data_and_the_sealed_job_on_record_and_charges_nothing(federation, admitted, job):
    del admitted
    _, dataset, plan, checkpoint = [entry.body for entry in federation.entries(SITE)]
    assert isinstance(dataset, DatasetOpened)
    assert isinstance(plan, PlanAccepted)
    assert isinstance(checkpoint, Checkpoint)
    assert plan.job == job.digest
    assert b"photos" not in encode(plan)


def test_being_shown_the_same_job_again_leaves_the_ledger_as_it_was(federation, admitted, job):
    before = federation.ledger(SITE).read_bytes()
    assert isinstance(told(federation, admitted, federation.admission(job)), Admitted)
    assert federation.ledger(SITE).read_bytes() == before


def test_the_manifest_commitment_differs_from_site_to_site_and_reveals_no_digest(federation, admitted):
    del admitted
    dataset = federation.entries(SITE)[1].body
    manifest = (federation.folder(SITE) / "manifest.csv").read_bytes()
    assert dataset.manifest_commitment != digest(manifest)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"modes": ("distributed",)}, "policy.modes"),
        ({"maximum_rounds": 1}, "policy.maximum_rounds is|exceeds policy.maximum_rounds 1"),
        ({"minimum_participants": 4}, "policy.minimum_participants is 4"),
        ({"minimum_items": 9}, "policy.minimum_items is 9"),
        ({"backbones": ("other",)}, "policy.backbones"),
        ({"delta": 1e-6}, "exceeds policy.delta 1e-06"),
        ({"epsilon_per_job": 10.0}, "policy.epsilon_per_job is 10.00"),
    ],
)
def test_a_job_that_breaks_a_rule_is_refused_and_leaves_nothing(federation, job, changed, line):
    policy = replace(POLICY, **changed)
    with federation.site(policy=policy) as site:
        code, reason = refusal(federation, site, federation.admission(job))
    assert code == "policy"
    assert any(part in reason for part in line.split("|"))
    assert [entry.body.kind for entry in federation.entries(SITE)] == ["genesis"]


def test_a_job_that_the_lifetime_budget_could_not_finish_is_refused_at_once(federation, job):
    with federation.site(policy=replace(POLICY, epsilon_limit=39.0)) as site:
        code, reason = refusal(federation, site, federation.admission(job))
    assert code == "budget"
    assert "ceiling is 39.00" in reason


@pytest.mark.parametrize(
    "forged",
    [
        lambda raw: raw.replace(b'"rounds":2', b'"rounds":3'),
        lambda raw: raw.replace(b'"max_grad_norm":1.0', b'"max_grad_norm":2.0', 1),
        lambda raw: raw.replace(b'"scale":', b'"scale":1'),
        lambda raw: raw.replace(b'"sensitivity":1048576', b'"sensitivity":1048577'),
    ],
)
def test_a_plan_that_is_not_the_spec_s_own_is_refused(federation, job, forged):
    """The coordinator signs whatever it likes; the plan inside must still follow from the job's own wish."""
    key, raw = federation.coordinator_key, encode(job)
    assert forged(raw) != raw
    envelope = _sealed_bytes(forged(raw), key)
    body = messages.AdmitRequest(job_envelope=envelope, seen="", ledger=federation.coordinator_head())
    request = Request(site=SITE, job=digest(forged(raw)), body=body, tensors_digest=digest(b""))
    with federation.site() as site:
        code, _ = refusal(federation, site, federation.signed(request, b""))
    assert code in {"malformed", "policy"}


def _sealed_bytes(payload, key):
    kind = payload_type(TrainingJob)
    signature = key.sign(pre_authentication_encoding(kind, payload))
    return (
        f'{{"payload":"{b64encode(payload).decode()}","payloadType":"{kind}",'
        f'"signatures":[{{"keyid":"{key.public.key_id}","sig":"{b64encode(signature).decode()}"}}]}}'
    )


def test_a_job_sealed_by_someone_else_is_refused(federation, job):
    with federation.site() as site:
        code, reason = refusal(federation, site, federation.admission(job, sealed_by=SigningKey.generate()))
    assert code == "malformed"
    assert "signed by key" in reason


def test_a_job_under_another_name_is_refused(federation, job):
    envelope = seal(job, federation.coordinator_key).decode()
    body = messages.AdmitRequest(job_envelope=envelope, seen="", ledger=federation.coordinator_head())
    request = Request(site=SITE, job="0" * 64, body=body, tensors_digest=digest(b""))
    with federation.site() as site:
        code, reason = refusal(federation, site, federation.signed(request, b""))
    assert (code, reason) == ("stale", "the sealed job is not the one that the message names")


def test_a_job_shown_again_after_it_has_begun_is_not_charged_for_twice_in_advance(federation, job):
    """A coordinator that resumes shows the job again; a ceiling that just fits the plan must still fit."""
    tight = replace(POLICY, epsilon_limit=40.0)
    with federation.site(policy=tight) as site:
        site.answer(federation.admission(job))
        site.answer(federation.question(job, ask("centre")))
        site.answer(federation.question(job, ask("train")))
        assert isinstance(told(federation, site, federation.admission(job)), Admitted)
        assert isinstance(told(federation, site, federation.question(job, ask("train", 1))), Contribution)


def test_changed_photos_under_an_old_name_are_refused(federation, job, caplog):
    with federation.site() as site:
        site.answer(federation.admission(job))
    manifest = federation.folder(SITE) / "manifest.csv"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    with federation.site() as site:
        answer = refusal_and_log(federation, site, federation.admission(federation.job(nonce="2")), caplog)
    assert answer[0] == "ledger"
    assert "manifest_commitment differs" in answer[2]
    assert str(federation.root) not in answer[1]


def test_old_items_get_no_new_budget_under_a_new_name(federation, job, caplog):
    """A cohort is for new items alone; even one old item among new ones is one too many."""
    with federation.site() as site:
        site.answer(federation.admission(job))
    manifest = federation.folder(SITE) / "manifest.csv"
    for text in (manifest.read_text(), "".join(manifest.read_text().splitlines(keepends=True)[:-1])):
        manifest.write_text(text)
        before = federation.ledger(SITE).read_bytes()
        with federation.site(cohorts={"2027": ("manifest.csv", DECLARED)}) as site:
            answer = refusal_and_log(federation, site, federation.admission(federation.job(nonce="2")), caplog)
        assert answer[0] == "ledger"
        assert "under account as" in answer[2]
        assert federation.ledger(SITE).read_bytes() == before


def test_without_its_members_file_a_ledger_opens_no_further_cohort(federation, job, caplog):
    with federation.site() as site:
        site.answer(federation.admission(job))
    (federation.folder(SITE) / "members.json").unlink()
    with federation.site(cohorts={"2027": ("manifest.csv", DECLARED)}) as site:
        answer = refusal_and_log(federation, site, federation.admission(federation.job(nonce="2")), caplog)
    assert answer[0] == "ledger"
    assert "restore the file" in answer[2]


def test_a_job_cannot_ask_about_single_labels_or_the_share_of_synthetic_photos(federation):
    """Whether a job is admitted depends on the partner's rules, never on which grades its photos have."""
    scale = replace(SCALE, labels=("A", "B", "X"), critical=("X",))
    curious = [
        replace(SPEC, grading=scale),
        replace(SPEC, data=replace(SPEC.data, synthetic_ceiling=0.05)),
    ]
    for spec in curious:
        with federation.site() as site:
            code, reason = refusal(federation, site, federation.admission(federation.job(spec)))
        assert code == "policy"
        assert "polic" in reason


def test_an_item_with_more_photos_than_declared_is_refused(federation, job, caplog):
    with federation.site(photos_per_item=1) as site:
        answer = refusal_and_log(federation, site, federation.admission(job), caplog)
    assert answer[0] == "data"
    assert "photos_per_item is 1" in answer[2]


def test_an_account_keeps_its_way_of_adding_up_for_life(federation, job, caplog):
    with federation.site() as site:
        site.answer(federation.admission(job))
    with federation.site(policy=replace(POLICY, modes=("local", "local_sgd"), epsilon_per_job=90.0)) as site:
        answer = refusal_and_log(federation, site, federation.admission(federation.job(nonce="2")), caplog)
    assert answer[0] == "ledger"
    assert "put policy.modes back" in answer[2]


def test_participants_who_are_on_nobody_s_roster_do_not_count(federation):
    """A coordinator must not reach policy.minimum_participants with partners that it made up."""
    items = dict.fromkeys((*NAMES[:2], "invented"), DECLARED)
    with federation.site() as site:
        code, reason = refusal(federation, site, federation.admission(plan_job(SPEC, declared_items=items, nonce="0")))
    assert code == "policy"
    assert reason == "job small: participant invented is not on this site's roster"


def test_a_declared_size_other_than_the_site_s_own_is_refused(federation):
    job = plan_job(SPEC, declared_items={**dict.fromkeys(NAMES, DECLARED), SITE: 9}, nonce="0")
    with federation.site() as site:
        code, _ = refusal(federation, site, federation.admission(job))
    assert code == "policy"


def test_a_job_dearer_than_the_policy_allows_says_what_to_do(federation):
    with federation.site() as site:
        _, reason = refusal(federation, site, federation.admission(federation.job(with_privacy(target_epsilon=45.0))))
    assert "ask for a lower privacy.target_epsilon" in reason
