"""A ledger that was put back to an older copy or written anew: noticed by the other side, and in the folder."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from fedgrade.errors import LedgerBroken, RoundFailed
from fedgrade.federation.in_process import InProcessCohort
from fedgrade.federation.rounds import RoundLog
from fedgrade.federation.store import RunStore
from fedgrade.federation.verification import verify_federation
from fedgrade.federation.witness import Witness
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from fedgrade.trust.records import Checkpoint, Reserve, RoundClosed
from tests.federation.small_federation import FIRST, NAMES, with_privacy

CULPRIT, OTHERS = NAMES[2], NAMES[:2]
SPEC = with_privacy(rounds=2)  # four stages
pytestmark = pytest.mark.usefixtures("quick")


class PowerCut(BaseException):
    """The process is gone."""


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def put_back(path, entries):
    """The ledger as it was when it had so many entries."""
    path.write_bytes(b"".join(lines_of(path)[:entries]))


def rewritten(path, key, change):
    """The ledger written anew with its own key, ``change`` having the last word on every entry."""
    bodies = [entry.body for entry in read_ledger(path, key=key.public)]
    path.unlink()
    with LedgerWriter.open(path, key=key, observe=lambda _: None) as writer:
        for body in bodies:
            for changed in change(body):
                writer.append(changed, now=FIRST)


@contextmanager
def restarting(federation):
    """Doors of all sites; the culprit's process is started for every message, and its files are free in between."""

    def answer(raw):
        with federation.site(CULPRIT) as site:
            return site.answer(raw)

    with federation.site(OTHERS[0]) as one, federation.site(OTHERS[1]) as two:
        yield {OTHERS[0]: one.answer, OTHERS[1]: two.answer, CULPRIT: answer}


# --- a site ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [True, False], ids=["members kept", "members put back"])
@pytest.mark.parametrize("kept", [1, 4, 8])
def test_a_site_that_put_its_ledger_back_between_two_jobs_stays_out_and_charges_nothing(
    federation, kept, members, caplog
):
    federation.run_in_process(federation.job(SPEC, nonce="first"))
    newest = federation.ledger(CULPRIT).read_bytes()
    put_back(federation.ledger(CULPRIT), kept)
    old = federation.ledger(CULPRIT).read_bytes()
    if not members:
        (federation.folder(CULPRIT) / "members.json").unlink()
    second = federation.job(SPEC, nonce="second")
    release = federation.run_in_process(second).release
    assert set(release.contributions) == set(OTHERS)
    assert federation.ledger(CULPRIT).read_bytes() == old
    assert "restore the newest copy; nothing was charged" in caplog.text
    with pytest.raises(LedgerBroken, match=CULPRIT):
        verify_federation(federation.root)

    federation.ledger(CULPRIT).write_bytes(newest)
    third = federation.job(SPEC, nonce="third")
    if members:
        assert set(federation.run_in_process(third).release.contributions) == set(NAMES)
    verify_federation(federation.root)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_site_that_puts_its_ledger_back_in_mid_job_is_left_out_from_there_on(federation, stage, caplog):
    job, path, copies = federation.job(SPEC), federation.ledger(CULPRIT), []

    def report(progress):
        copies.append(len(lines_of(path)))
        if progress.stage == stage:
            put_back(path, copies[0] - 2)  # before its first contribution

    with restarting(federation) as answers:
        federation.run(job, InProcessCohort(sites=answers), report=report)
    assert federation.release(job).release.contributions == {OTHERS[0]: 4, OTHERS[1]: 4, CULPRIT: stage}
    assert (
        f"site {CULPRIT} stays out: its ledger was rewritten or rolled back since entry {copies[stage - 1]}"
        in caplog.text
    )
    with pytest.raises(LedgerBroken, match=f"{CULPRIT}.*rolled back or forked"):
        verify_federation(federation.root)


def test_a_coordinator_that_resumes_remembers_where_a_ledger_stood(federation, caplog):
    """Put back while the coordinator was down, by software that does not look: its next contribution gives it away."""
    job, path = federation.job(SPEC), federation.ledger(CULPRIT)

    def report(progress):
        if progress.stage == 2:
            raise PowerCut

    with restarting(federation) as answers:
        with pytest.raises(PowerCut):
            federation.run(job, InProcessCohort(sites=answers), report=report)

        def admit_then_put_back(raw):
            reply = answers[CULPRIT](raw)
            if federation.opened(reply, name=CULPRIT).document.body.kind == "admitted":
                put_back(path, 4)
            return reply

        federation.run(job, InProcessCohort(sites={**answers, CULPRIT: admit_then_put_back}))
    assert federation.release(job).release.contributions[CULPRIT] == 2
    assert f"site {CULPRIT} stays out: its ledger was rewritten or rolled back since entry 8" in caplog.text


def test_a_site_that_dropped_a_charge_and_signed_everything_anew_is_found_out_at_once(federation, caplog):
    federation.run_in_process(federation.job(SPEC, nonce="first"))
    charges = iter(range(100))

    def drop_one(body):
        return [] if isinstance(body, Reserve) and next(charges) == 1 else [body]

    rewritten(federation.ledger(CULPRIT), federation.site_keys[CULPRIT], drop_one)
    old = federation.ledger(CULPRIT).read_bytes()
    release = federation.run_in_process(federation.job(SPEC, nonce="second")).release
    assert set(release.contributions) == set(OTHERS)
    assert "this is an older copy, or was rewritten" in caplog.text
    assert federation.ledger(CULPRIT).read_bytes() == old


def test_what_only_the_coordinator_saw_is_missed_by_the_verifier_too(federation):
    """No receipt is lost: the site was shown a job that never began, and put its ledger back to before that."""
    federation.run_in_process(federation.job(SPEC, nonce="first"))
    entries = len(lines_of(federation.ledger(CULPRIT)))
    with restarting(federation) as answers, pytest.raises(RoundFailed):
        federation.run(
            federation.job(replace(SPEC, aggregation=replace(SPEC.aggregation, minimum_sites=3)), nonce="never"),
            InProcessCohort(sites={CULPRIT: answers[CULPRIT]}),
        )
    verify_federation(federation.root)
    put_back(federation.ledger(CULPRIT), entries)
    with pytest.raises(
        LedgerBroken, match=rf"ledger of {CULPRIT}: has {entries} entries; witnessed head .*saw {entries + 2} .*rolled"
    ):
        verify_federation(federation.root)


# --- the coordinator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_a_coordinator_that_put_its_ledger_back_finds_no_site(federation, kept):
    federation.run_in_process(federation.job(SPEC, nonce="first"))
    federation.run_in_process(federation.job(SPEC, nonce="second"))
    newest = federation.coordinator_ledger.read_bytes()
    put_back(federation.coordinator_ledger, kept)
    before = {name: federation.ledger(name).read_bytes() for name in NAMES}
    third = federation.job(SPEC, nonce="third")
    with pytest.raises(RoundFailed, match=rf"refused \(stale\): .*has {kept} entries; this site saw 6 of it"):
        federation.run_in_process(third)
    assert {name: federation.ledger(name).read_bytes() for name in NAMES} == before
    federation.coordinator_ledger.write_bytes(newest)
    federation.run_in_process(third)
    verify_federation(federation.root)


def test_a_coordinator_s_ledger_signed_anew_is_named_with_the_entry_that_saw_another(federation):
    """Word for word the same, and even so another ledger: nobody else could have told."""
    federation.run_in_process(federation.job(SPEC))
    rewritten(federation.coordinator_ledger, federation.coordinator_key, lambda body: [body])
    path = federation.coordinator_ledger
    with pytest.raises(
        LedgerBroken, match=rf"ledger {path}: its first 1 entries .*; entry 3 of the ledger of {NAMES[0]} saw"
    ):
        verify_federation(federation.root)


def test_a_coordinator_s_ledger_cut_to_before_what_a_site_saw_is_named(federation):
    """Without the folder of the job, nothing but the site's own entry tells of the missing ones."""
    first = federation.job(SPEC, nonce="first")
    federation.run_in_process(first)
    federation.run_in_process(federation.job(SPEC, nonce="second"))
    for folder in (federation.root / "jobs").iterdir():
        folder.rename(federation.root / folder.name)
    put_back(federation.coordinator_ledger, 1)
    with pytest.raises(LedgerBroken, match=r"has 1 entries; entry 13 of the ledger of recycler-a saw 6 .*rolled back"):
        verify_federation(federation.root)


def test_a_coordinator_that_says_it_saw_another_history_is_found(federation):
    federation.run_in_process(federation.job(SPEC))

    def lie(body):
        if not isinstance(body, RoundClosed):
            return [body]
        state = replace(body.ledgers[CULPRIT], root="0" * 64)
        return [replace(body, ledgers={**body.ledgers, CULPRIT: state})]

    rewritten(federation.coordinator_ledger, federation.coordinator_key, lie)
    with pytest.raises(
        LedgerBroken,
        match=rf"ledger of {CULPRIT}: its first 6 .*; ledger {federation.coordinator_ledger}: entry 1 saw 0000",
    ):
        verify_federation(federation.root)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda body: [replace(body, owner=NAMES[0])], "records where the ledger of recycler-a stood"),
        (lambda body: [replace(body, head="{}")], "entry 3: "),
        (lambda body: [replace(body, head=body.head.replace('"sig":"', '"sig":"A'))], "entry 3: "),
    ],
)
def test_a_site_cannot_invent_what_it_saw_of_the_coordinator(federation, change, line):
    federation.run_in_process(federation.job(SPEC))
    path = federation.ledger(CULPRIT)
    rewritten(
        path, federation.site_keys[CULPRIT], lambda body: change(body) if isinstance(body, Checkpoint) else [body]
    )
    with pytest.raises(LedgerBroken, match=line):
        verify_federation(federation.root)


def test_a_site_that_let_the_coordinator_s_ledger_shrink_is_found(federation):
    federation.run_in_process(federation.job(SPEC, nonce="first"))
    federation.run_in_process(federation.job(SPEC, nonce="second"))
    path, key = federation.ledger(CULPRIT), federation.site_keys[CULPRIT]
    heads = [entry.body for entry in read_ledger(path, key=key.public) if isinstance(entry.body, Checkpoint)]
    turned = iter(reversed(heads))
    rewritten(path, key, lambda body: [next(turned)] if isinstance(body, Checkpoint) else [body])
    with pytest.raises(LedgerBroken, match="records 1 entries of the coordinator's ledger, after 6 before"):
        verify_federation(federation.root)


# --- accidents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Witness, "admit", 1),
        (Witness, "receive", 0),
        (Witness, "receive", 4),
        (RoundLog, "close_round", 1),
        (RunStore, "save", 1),
    ],
)
def test_a_power_cut_at_the_coordinator_shuts_nobody_out(federation, owner, name, call, after):
    """What was kept of a site's ledger may be newer than what the site sends again; that is no rollback."""
    job = federation.job(SPEC)
    for _ in range(2):
        with federation.answers() as answers, power_cut(owner, name, call, after=after):
            federation.run(job, InProcessCohort(sites=answers))
    federation.run_in_process(job)
    assert {site: len(federation.charges(site)) for site in NAMES} == dict.fromkeys(NAMES, 4)
    assert federation.release(job).release.contributions == dict.fromkeys(NAMES, 4)
    verify_federation(federation.root)


@contextmanager
def power_cut(owner, name, call, *, after):
    """The power goes at the given call of ``name``, before or after it has done its work."""
    real, calls = getattr(owner, name), iter(range(1000))

    def cut(*arguments, **named):
        if next(calls) != call:
            return real(*arguments, **named)
        if after:
            real(*arguments, **named)
        raise PowerCut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(PowerCut):
            yield
