"""What a site checks before it takes part in a job, and what it puts on record."""

from base64 import b64encode
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrade.data.manifest import Manifest, Photo, Provenance, Split, read_manifest, write_manifest
from fedgrade.errors import LedgerBroken
from fedgrade.federation import messages
from fedgrade.federation.members import Members
from fedgrade.federation.messages import Admitted, Contribution, Refusal, Request
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
    write_photos,
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


def test_old_items_get_no_second_budget_by_way_of_a_manifest_that_was_refused(federation, job, caplog):
    """Other items under the old name are refused, and the record of who is in that cohort outlives it."""
    folder = federation.folder(SITE)
    with federation.site() as site:
        site.answer(federation.admission(job))
        site.answer(federation.question(job, ask("centre")))
    old, members = (folder / "manifest.csv").read_bytes(), (folder / "members.json").read_bytes()
    (folder / "manifest.csv").write_bytes(write_manifest(later_photos(federation)))
    with federation.site() as site:
        assert refusal(federation, site, federation.admission(federation.job(nonce="2")))[0] == "ledger"
    assert (folder / "members.json").read_bytes() == members
    dropped = read_manifest(old, SCALE).photos[-1].item
    kept = [photo for photo in read_manifest(old, SCALE).photos if photo.item != dropped]
    (folder / "old.csv").write_bytes(write_manifest(kept))
    with federation.site(cohorts={"2027": ("old.csv", DECLARED)}) as site:
        answer = refusal_and_log(federation, site, federation.admission(federation.job(nonce="3")), caplog)
    assert answer[0] == "ledger"
    assert "holds items that are under account as squares-recycler-a/2026" in answer[2]


@pytest.mark.parametrize("name", ["2025", "2027"])
def test_new_items_that_were_listed_in_the_old_cohort_may_be_listed_in_a_new_one(federation, job, caplog, name):
    """What the error advises works, whether the new name comes before the old one or after it."""
    folder = federation.folder(SITE)
    with federation.site() as site:
        site.answer(federation.admission(job))
    old, new = (folder / "manifest.csv").read_bytes(), later_photos(federation)
    (folder / "manifest.csv").write_bytes(write_manifest([*read_manifest(old, SCALE).photos, *new]))
    with federation.site() as site:
        answer = refusal_and_log(federation, site, federation.admission(federation.job(nonce="2")), caplog)
    assert "put the manifest back, and list new items alone in a new cohort" in answer[2]
    (folder / "manifest.csv").write_bytes(old)
    (folder / "new.csv").write_bytes(write_manifest(new))
    cohorts = {"2026": ("manifest.csv", DECLARED), name: ("new.csv", DECLARED)}
    with federation.site(cohorts=cohorts) as site:
        again = federation.job(nonce="3", declared=2 * DECLARED)
        assert isinstance(told(federation, site, federation.admission(again)), Admitted)


def test_a_refused_admission_leaves_no_members_behind(federation, job):
    """Terms of every cohort are asked before anything is written, also of those that come last."""
    folder = federation.folder(SITE)
    with federation.site() as site:
        site.answer(federation.admission(job))
    members = (folder / "members.json").read_bytes()
    (folder / "new.csv").write_bytes(write_manifest(later_photos(federation)))
    (folder / "manifest.csv").write_bytes((folder / "manifest.csv").read_bytes().replace(b",own,", b",other,"))
    with federation.site(cohorts={"2025": ("new.csv", DECLARED), "2026": ("manifest.csv", DECLARED)}) as site:
        again = federation.job(nonce="2", declared=2 * DECLARED)
        assert refusal(federation, site, federation.admission(again))[0] == "ledger"
    assert (folder / "members.json").read_bytes() == members


@pytest.mark.parametrize("swapped", ["cohort", "items"])
def test_a_restart_in_mid_job_with_other_cohorts_reads_nothing_at_the_old_ones_expense(
    federation, job, caplog, swapped
):
    """The job states one size and not which cohorts have it: the admitted ones must still be there."""
    with federation.site() as site:
        site.answer(federation.admission(job))
        site.answer(federation.question(job, ask("centre")))
    charges = len(federation.charges(SITE))
    if swapped == "items":
        (federation.folder(SITE) / "new.csv").write_bytes(write_manifest(later_photos(federation)))
    manifest = {"cohort": "manifest.csv", "items": "new.csv"}[swapped]
    with federation.site(cohorts={"2027": (manifest, DECLARED)}) as site:
        body = told(federation, site, federation.question(job, ask("train")))
    assert isinstance(body, Refusal)
    assert body.code == "ledger"
    assert {"cohort": "under account as", "items": "is listed no more"}[swapped] in caplog.text
    assert len(federation.charges(SITE)) == charges
    with federation.site() as site:
        assert isinstance(told(federation, site, federation.question(job, ask("train"))), Contribution)


NUMBERS = st.frozensets(st.integers(0, 12), max_size=3)


@settings(max_examples=60)
@given(
    opened=st.dictionaries(st.sampled_from("bdf"), NUMBERS),
    stale=st.booleans(),
    new=st.dictionaries(st.sampled_from("aceg"), NUMBERS),
)
def test_new_cohorts_are_let_in_exactly_if_no_item_is_in_two(tmp_path_factory, opened, stale, new):
    """Against counting by hand: whatever the names, and whatever an admission that came to nothing left behind."""
    left_behind = {"stale": frozenset(range(13))} if stale else {}
    path = tmp_path_factory.mktemp("members") / "members.json"
    opened = {name: frozenset(2 * number + 100 * ord(name) for number in numbers) for name, numbers in opened.items()}
    shared = {number for numbers in opened.values() for number in numbers}
    new = {
        name: frozenset(min(shared, default=0) if number == 0 else number for number in items)
        for name, items in new.items()
    }
    names = frozenset(f"squares/{name}" for name in opened)
    members = Members(path, secret=b"secret")
    members.keep(members.require_apart(listed({**left_behind, **opened}), lineage="squares", opened=frozenset()))
    before = path.read_bytes() if path.exists() else b""
    counted = [number for items in (*opened.values(), *new.values()) for number in items]
    if len(counted) == len(set(counted)):
        known = members.require_apart(listed({**opened, **new}), lineage="squares", opened=names)
        members.keep(known)
        assert Members(path, secret=b"secret").require_apart({}, lineage="squares", opened=frozenset(known)) == known
    else:
        with pytest.raises(LedgerBroken, match="under account as"):
            members.require_apart(listed({**opened, **new}), lineage="squares", opened=names)
        assert (path.read_bytes() if path.exists() else b"") == before


def test_a_members_file_with_other_items_than_the_ledger_is_not_overwritten(tmp_path):
    members = Members(tmp_path / "members.json", secret=b"secret")
    members.keep(members.require_apart(listed({"a": {1, 2}}), lineage="squares", opened=frozenset()))
    with pytest.raises(LedgerBroken, match="has other items for squares/a than the ledger"):
        members.require_apart(listed({"a": {1, 3}}), lineage="squares", opened=frozenset({"squares/a"}))


def listed(cohorts):
    """A manifest a cohort, of items by number."""
    return {
        name: Manifest(
            photos=tuple(_numbered(number) for number in items),
            digest="0" * 64,
            scale=SCALE,
        )
        for name, items in cohorts.items()
    }


def _numbered(number):
    return Photo(
        path=f"{number}.png",
        digest=digest(str(number).encode()),
        item=f"item-{number}",
        source=f"source-{number}",
        grade="A",
        split=Split.TRAIN,
        provenance=Provenance.REAL,
        licence="own",
        origin="generated for a test",
    )


def later_photos(federation):
    """New items of the first site, on disk and in no manifest yet."""
    folder = federation.folder(SITE)
    photos = write_photos(folder / "later", first=5000)
    for photo in photos:
        (folder / "later" / photo.path).rename(folder / "photos" / photo.path)
    return photos


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
