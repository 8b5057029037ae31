"""The partner's last word: a policy that changes while a job is on, closed hours, a person who must approve."""

from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime

import pytest
import yaml

from fedgrade.errors import DocumentRefused, JobRefused, PolicyViolated, RoundFailed, SiteWaits
from fedgrade.federation.approvals import MAX_WAITING
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.messages import Admitted, Contribution, Refusal
from fedgrade.federation.policy import Policy, require_coordinator, require_open
from fedgrade.federation.verification import verify_federation
from fedgrade.privacy.fixed_point import MAX_PHOTOS
from fedgrade.trust.canonical import decode_yaml
from fedgrade.trust.records import DatasetOpened
from tests.federation.small_federation import NAMES, POLICY, SPEC, ask, refusal, told, with_privacy

pytestmark = pytest.mark.usefixtures("quick")
SITE = NAMES[0]
ASKING = replace(POLICY, approval=True)
GUARDED = replace(
    POLICY, releases=("centre", "train"), coordinators=("a" * 64,), hours="20:00-06:00", approval=True, modes=("local",)
)


@pytest.fixture
def job(federation):
    return federation.job()


def test_a_policy_that_was_changed_counts_from_the_next_request_on(federation, job):
    standing = [POLICY]
    with federation.site(policy=lambda: standing[0]) as site:
        assert isinstance(told(federation, site, federation.admission(job)), Admitted)
        assert isinstance(told(federation, site, federation.question(job, ask("centre"))), Contribution)
        standing[0] = replace(POLICY, minimum_participants=4)
        code, reason = refusal(federation, site, federation.question(job, ask("train")))
        assert (code, "policy.minimum_participants is 4" in reason) == ("policy", True)
        standing[0] = POLICY
        assert isinstance(told(federation, site, federation.question(job, ask("train"))), Contribution)


def test_a_ceiling_that_was_lowered_in_mid_job_is_on_record_before_the_next_charge(federation, job):
    standing = [POLICY]
    with federation.site(policy=lambda: standing[0]) as site:
        site.answer(federation.admission(job))
        site.answer(federation.question(job, ask("centre")))
        standing[0] = replace(POLICY, epsilon_limit=90.0)
        assert isinstance(told(federation, site, federation.question(job, ask("train"))), Contribution)
    opened = [entry.body for entry in federation.entries(SITE) if isinstance(entry.body, DatasetOpened)]
    assert [float(dataset.epsilon_limit) for dataset in opened] == [100.0, 90.0]
    assert [float(charge.epsilon_limit) for charge in federation.charges(SITE)] == [100.0, 90.0]


def test_a_policy_that_cannot_be_read_stops_the_site_until_it_can(federation, job, caplog):
    broken = [False]

    def policy():
        if broken[0]:
            raise DocumentRefused("policy /home/somebody/policy.yaml: line 3: not YAML")
        return POLICY

    with federation.site(policy=policy) as site:
        site.answer(federation.admission(job))
        broken[0] = True
        code, reason = refusal(federation, site, federation.question(job, ask("centre")))
        assert (code, "somebody" in reason) == ("waiting", False)
        assert "line 3: not YAML" in caplog.text
        broken[0] = False
        assert isinstance(told(federation, site, federation.question(job, ask("centre"))), Contribution)


@pytest.mark.parametrize(
    ("hours", "now", "open_"),
    [
        ("", "03:00", True), ("20:00-06:00", "03:00", True), ("20:00-06:00", "20:00", True),
        ("20:00-06:00", "06:00", False), ("20:00-06:00", "12:00", False), ("08:00-18:00", "08:00", True),
        ("08:00-18:00", "18:00", False), ("08:00-18:00", "07:59", False),
    ],
)  # fmt: skip
def test_hours_are_those_of_a_day_or_of_a_night(hours, now, open_):
    policy, at = replace(POLICY, hours=hours), datetime.fromisoformat(f"2026-05-05T{now}").time()
    if open_:
        require_open(policy, at)
    else:
        with pytest.raises(SiteWaits, match=hours):
            require_open(policy, at)


def test_outside_of_its_hours_a_site_counts_as_silent_and_is_back_in_the_morning(federation, job):
    closed = replace(POLICY, hours="22:00-23:00")
    with federation.site(policy=closed) as site:
        assert refusal(federation, site, federation.admission(job)) == (
            "waiting", "this site answers in its policy.hours, 22:00-23:00 by its own clock"
        )  # fmt: skip
    with federation.site(policy=closed, local_time=datetime.fromisoformat("2026-05-05T22:30")) as site:
        assert isinstance(told(federation, site, federation.admission(job)), Admitted)


@pytest.mark.parametrize(
    "hours", ["24:00-06:00", "8:00-18:00", "08:00-08:00", "08:00", "08:00-18:00 ", "08:00-18:60", "a"]
)
def test_hours_that_are_none_are_refused_with_the_file(hours):
    with pytest.raises(DocumentRefused, match=r"policy\.hours"):
        replace(POLICY, hours=hours)


def test_a_job_waits_for_a_person_and_runs_once_approved(federation, job):
    with federation.site(policy=ASKING) as site:
        code, reason = refusal(federation, site, federation.admission(job))
        assert (code, "waits for this site's operator" in reason) == ("waiting", True)
        (asked,) = federation.approvals().asked(coordinator=federation.roster.coordinator)
        assert (asked.job, asked.decision) == (job, "waiting")
        assert federation.charges(SITE) == []
        federation.approvals().decide(job, "approved")
        assert isinstance(told(federation, site, federation.admission(job)), Admitted)
        assert isinstance(told(federation, site, federation.question(job, ask("centre"))), Contribution)


def test_a_declined_job_is_refused_for_good(federation, job):
    with federation.site(policy=ASKING) as site:
        site.answer(federation.admission(job))
        federation.approvals().decide(job, "declined")
        code, reason = refusal(federation, site, federation.admission(job))
        assert (code, "was declined" in reason) == ("policy", True)


def test_approval_of_one_job_says_nothing_about_the_next(federation, job):
    with federation.site(policy=ASKING) as site:
        site.answer(federation.admission(job))
        federation.approvals().decide(job, "approved")
        assert isinstance(told(federation, site, federation.admission(federation.job(nonce="1"))), Refusal)


def test_a_coordinator_that_shows_job_after_job_fills_no_disk(federation):
    with federation.site(policy=ASKING) as site:
        for number in range(MAX_WAITING):
            site.answer(federation.admission(federation.job(with_privacy(rounds=1), nonce=str(number))))
        code, _ = refusal(federation, site, federation.admission(federation.job(nonce="one more")))
    assert code == "policy"
    assert len(federation.approvals().asked(coordinator=federation.roster.coordinator)) == MAX_WAITING


def test_what_was_never_shown_cannot_be_approved(federation, job):
    with pytest.raises(JobRefused, match="never shown"):
        federation.approvals().decide(job, "approved")


def test_a_job_goes_on_without_the_site_whose_operator_is_asleep(federation, job):
    with ExitStack() as stack:
        sites = {
            name: stack.enter_context(federation.site(name, policy=ASKING if name == SITE else POLICY))
            for name in NAMES
        }
        federation.run(job, InProcessCohort(sites={name: site.answer for name, site in sites.items()}))
    assert set(federation.release(job).release.contributions) == set(NAMES) - {SITE}
    assert federation.charges(SITE) == []
    verify_federation(federation.root)


def test_a_patient_coordinator_asks_again_until_a_person_has_decided(federation, job, monkeypatch):
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            federation.approvals().decide(job, "approved")

    monkeypatch.setattr("fedgrade.federation.conversation.time.sleep", pause)
    with ExitStack() as stack:
        sites = {
            name: stack.enter_context(federation.site(name, policy=ASKING if name == SITE else POLICY))
            for name in NAMES
        }
        cohort = InProcessCohort(sites={name: site.answer for name, site in sites.items()})
        federation.run(job, cohort, admission_seconds=60.0)
    assert len(pauses) == 2
    assert set(federation.release(job).release.contributions) == set(NAMES)


def test_if_too_many_operators_are_asleep_the_run_says_whose(federation, job):
    with pytest.raises(RoundFailed, match=r"refused \(waiting\): job small: waits for this site's operator"):
        federation.run_in_process(job, policy=ASKING)


def test_a_partner_may_train_and_not_be_measured_on(federation, job):
    shy = replace(POLICY, releases=("centre", "train"))
    with federation.site(policy=shy) as site:
        site.answer(federation.admission(job))
        assert isinstance(told(federation, site, federation.question(job, ask("centre"))), Contribution)
        code, reason = refusal(federation, site, federation.question(job, ask("evaluate")))
    assert (code, "policy.releases" in reason) == ("policy", True)


def test_a_coordinator_that_the_policy_does_not_name_is_refused(federation, job):
    key = federation.roster.coordinator
    for named in (key.key_id, key.fingerprint, key.fingerprint.replace(" ", "").upper()):
        require_coordinator(replace(POLICY, coordinators=(named,)), key)
    other = replace(POLICY, coordinators=("0" * 64,))
    with pytest.raises(PolicyViolated, match=r"is not among policy\.coordinators"):
        require_coordinator(other, key)
    with federation.site(policy=other) as site:
        assert refusal(federation, site, federation.admission(job))[0] == "policy"


def test_a_policy_file_that_was_cut_short_is_never_another_policy():
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(GUARDED).items()}
    text = yaml.safe_dump(values, sort_keys=False)
    assert decode_yaml(Policy, text.encode(), what="policy") == GUARDED
    for cut in range(len(text)):
        try:
            assert decode_yaml(Policy, text[:cut].encode(), what="policy") == GUARDED
        except DocumentRefused:
            continue


def test_approval_that_is_asked_for_from_now_on_counts_in_the_middle_of_a_job(federation, job):
    standing = [POLICY]
    with federation.site(policy=lambda: standing[0]) as site:
        site.answer(federation.admission(job))
        site.answer(federation.question(job, ask("centre")))
        standing[0] = ASKING
        assert refusal(federation, site, federation.question(job, ask("train")))[0] == "waiting"
        federation.approvals().decide(job, "approved")
        assert isinstance(told(federation, site, federation.question(job, ask("train"))), Contribution)


def test_an_approval_that_is_taken_back_ends_the_job_at_this_site(federation, job):
    with federation.site(policy=ASKING) as site:
        site.answer(federation.admission(job))
        federation.approvals().decide(job, "approved")
        assert isinstance(told(federation, site, federation.admission(job)), Admitted)
        federation.approvals().decide(job, "declined")
        code, reason = refusal(federation, site, federation.question(job, ask("centre")))
    assert (code, "was declined" in reason) == ("policy", True)


def test_what_was_sent_before_is_not_sent_again_while_the_policy_says_no(federation, job):
    standing = [POLICY]
    with federation.site(policy=lambda: standing[0]) as site:
        site.answer(federation.admission(job))
        question = federation.question(job, ask("centre"))
        first = site.answer(question)
        standing[0] = replace(POLICY, hours="22:00-23:00")
        assert refusal(federation, site, question)[0] == "waiting"
        standing[0] = POLICY
        assert site.answer(question) == first


def declined(federation, job, _standing):
    federation.approvals().decide(job, "declined")


def without_training(_federation, _job, standing):
    standing[0] = replace(ASKING, releases=("centre", "evaluate"))


@pytest.mark.parametrize("forbid", [declined, without_training])
@pytest.mark.parametrize("restarted", [False, True])
def test_an_answer_that_was_kept_does_not_leave_once_its_owner_forbids_it(federation, job, forbid, restarted):
    """It was charged for, and may never have arrived: to send it now would be to release it now."""
    standing, question = [ASKING], federation.question(job, ask("train"))
    with federation.site(policy=lambda: standing[0]) as site:
        site.answer(federation.admission(job))
        federation.approvals().decide(job, "approved")
        site.answer(federation.admission(job))
        first = site.answer(question)
        assert site.answer(question) == first
        if not restarted:
            forbid(federation, job, standing)
            assert refusal(federation, site, question)[0] == "policy"
    if restarted:
        forbid(federation, job, standing)
        with federation.site(policy=lambda: standing[0]) as site:
            assert refusal(federation, site, question)[0] == "policy"
    # Said so in time, it is what it was.
    standing[0] = ASKING
    federation.approvals().decide(job, "approved")
    with federation.site(policy=ASKING) as site:
        assert site.answer(question) == first
    assert len(federation.charges(SITE)) == 1


@pytest.mark.parametrize("restarted", [False, True])
def test_what_was_paid_for_under_other_rules_still_arrives(federation, job, restarted):
    """Rules about what a job must be like to be charged for; the next question falls under them."""
    standing, question = [POLICY], federation.question(job, ask("centre"))
    with ExitStack() as stack:
        site = stack.enter_context(federation.site(policy=lambda: standing[0]))
        site.answer(federation.admission(job))
        first = site.answer(question)
        standing[0] = replace(POLICY, epsilon_per_job=0.5)
        if restarted:
            stack.pop_all().close()
            site = stack.enter_context(federation.site(policy=standing[0]))
        assert site.answer(question) == first
        assert refusal(federation, site, federation.question(job, ask("train")))[0] == "policy"


def test_nobody_pays_for_a_model_that_too_few_would_be_measured_on(federation, job):
    shy = replace(POLICY, releases=("centre", "train"))
    with ExitStack() as stack:
        sites = {
            name: stack.enter_context(federation.site(name, policy=POLICY if name == SITE else shy)) for name in NAMES
        }
        cohort = InProcessCohort(sites={name: site.answer for name, site in sites.items()})
        with pytest.raises(RoundFailed, match=r"evaluation: 1 sites.*recycler-b, recycler-c does not evaluate"):
            federation.run(job, cohort)
    assert all(federation.charges(name) == [] for name in NAMES)


def test_a_site_that_is_not_measured_on_trains_to_the_end(federation, job):
    shy = replace(POLICY, releases=("centre", "train"))
    with ExitStack() as stack:
        sites = {
            name: stack.enter_context(federation.site(name, policy=shy if name == SITE else POLICY)) for name in NAMES
        }
        federation.run(job, InProcessCohort(sites={name: site.answer for name, site in sites.items()}))
    stages = job.plan.rounds + 2
    assert federation.release(job).release.contributions == {SITE: stages - 1, NAMES[1]: stages, NAMES[2]: stages}
    verify_federation(federation.root)


def test_without_centre_and_train_a_site_takes_no_part(federation, job):
    with federation.site(policy=replace(POLICY, releases=("centre", "evaluate"))) as site:
        code, reason = refusal(federation, site, federation.admission(job))
    assert (code, "centre and train are needed" in reason) == ("policy", True)


@pytest.mark.parametrize("name", ["approvals", "members"])
def test_a_damaged_file_of_its_own_is_named_to_nobody_else(federation, job, caplog, name):
    with federation.site(policy=ASKING) as site:
        site.answer(federation.admission(job))
        federation.approvals().decide(job, "approved")
        site.answer(federation.admission(job))
    folder = federation.folder(SITE)
    damaged = folder / "members.json" if name == "members" else next((folder / "approvals").glob("*.json"))
    damaged.write_bytes(b"{")
    with federation.site(policy=ASKING) as site:
        code, reason = refusal(federation, site, federation.question(job, ask("centre")))
    assert (code, str(folder) in reason) == ("ledger", False)
    assert str(damaged) in caplog.text


def test_one_damaged_question_keeps_no_other_job_from_being_asked_about(federation, job):
    with federation.site(policy=ASKING) as site:
        site.answer(federation.admission(job))
        next((federation.folder(SITE) / "approvals").glob("*.json")).write_bytes(b"{")
        code, reason = refusal(federation, site, federation.admission(federation.job(nonce="1")))
    assert (code, "waits for this site's operator" in reason) == ("waiting", True)


def test_more_photos_than_can_be_added_up_are_refused_before_anything_is_charged(federation, job):
    with federation.site(photos_per_item=MAX_PHOTOS + 1) as site:
        code, reason = refusal(federation, site, federation.admission(job))
    assert (code, f"at most {MAX_PHOTOS} can be added up" in reason) == ("policy", True)
    with federation.site(photos_per_item=MAX_PHOTOS) as site:
        views = replace(SPEC, model=replace(SPEC.model, views=("upright", "flip_horizontal")))
        assert refusal(federation, site, federation.admission(federation.job(views)))[0] == "policy"
