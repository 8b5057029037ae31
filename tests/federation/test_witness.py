"""What a site and a coordinator make of each other's ledger heads: only growth passes, whoever signed."""

import json
import logging
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgrade.errors import FedgradeError, LedgerBroken, MessageRefused, RoundFailed
from fedgrade.federation.claims import require_coordinator_holds
from fedgrade.federation.messages import Admitted, Contribution, write_message
from fedgrade.federation.store import Folder
from fedgrade.federation.verification import verify_federation
from fedgrade.federation.witness import Witness, _hashes, follows
from fedgrade.trust.canonical import digest, encode
from fedgrade.trust.identity import Roster, SigningKey, SiteId
from fedgrade.trust.records import COORDINATOR, Checkpoint, LedgerState
from fedgrade.trust.transparency import GrowingTree, MerkleTree, TreeHead, open_head, sign_head
from tests.federation.meddling import HONEST, LIAR, Meddled, liar_alone, run, trained_without
from tests.federation.small_federation import NAMES, ask, refusal, refusal_and_log, told, with_privacy

SITE = NAMES[0]
KEY = SigningKey.generate()
ROSTER = Roster(coordinator=SigningKey.generate().public, sites={SITE: KEY.public})
TIME = "2026-07-01T12:00:00.000000+00:00"
pytestmark = pytest.mark.usefixtures("quiet")


def tree_over(lines):
    tree = GrowingTree()
    for line in lines:
        tree.append(line)
    return tree


def head_over(lines, *, owner=SITE, key=KEY, time=TIME):
    """The sealed head of a ledger with these lines."""
    root = tree_over(lines).root(len(lines)).hex()
    head = TreeHead(owner=owner, entries=len(lines), root=root, last_line=digest(lines[-1]), time=time)
    return sign_head(head, key).decode()


def admitted_with(lines, *, since=0):
    proof = tree_over(lines).consistency(older=min(since, len(lines)))
    return Admitted(head=head_over(lines), consistency=tuple(node.hex() for node in proof))


lines_of = st.lists(st.binary(max_size=3), min_size=1, max_size=20)


# --- laws ----------------------------------------------------------------------------------------------------------


@given(lines=lines_of, more=st.lists(st.binary(max_size=3), max_size=20))
def test_a_ledger_that_only_grew_is_admitted_and_its_newest_head_kept(tmp_path_factory, lines, more):
    folder = tmp_path_factory.mktemp("witness")
    Witness(Folder(folder), roster=ROSTER).admit(SITE, admitted_with(lines))
    assert Witness(Folder(folder), roster=ROSTER).seen(SITE) == head_over(lines)
    Witness(Folder(folder), roster=ROSTER).admit(SITE, admitted_with([*lines, *more], since=len(lines)))
    assert Witness(Folder(folder), roster=ROSTER).seen(SITE) == head_over([*lines, *more])


@given(data=st.data(), lines=lines_of, more=st.lists(st.binary(max_size=3), max_size=20))
def test_a_ledger_rewritten_anywhere_before_the_head_that_was_seen_is_not(tmp_path_factory, data, lines, more):
    witness = Witness(Folder(tmp_path_factory.mktemp("witness")), roster=ROSTER)
    witness.admit(SITE, admitted_with(lines))
    at = data.draw(st.integers(0, len(lines) - 1))
    changed = data.draw(st.sampled_from([[*lines[:at], *lines[at + 1 :]], [*lines[:at], b"else", *lines[at + 1 :]]]))
    whole = [*changed, *more] or [b"begun anew"]
    if whole[: len(lines)] == lines:
        return
    with pytest.raises(LedgerBroken, match=f"rewritten or rolled back since entry {len(lines)} "):
        witness.admit(SITE, admitted_with(whole, since=len(lines)))
    assert witness.seen(SITE) == head_over(lines)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from("ab"), st.sampled_from("ab"))
def test_a_ledger_follows_itself_and_what_is_smaller(entries, before, root, standing):
    now, then = LedgerState(entries=entries, root=64 * root), LedgerState(entries=before, root=64 * standing)
    assert follows(now, then) == (entries > before or (entries, root) == (before, standing))


# --- what a site refuses -------------------------------------------------------------------------------------------


def own_head(federation):
    with federation.site() as site:
        return told(federation, site, federation.admission(federation.job(nonce="first"))).head


def test_a_site_says_where_its_ledger_stands_and_proves_that_it_grew(federation, job):
    seen = own_head(federation)
    with federation.site() as site:
        body = told(federation, site, federation.admission(job, seen=seen))
    witness = Witness(Folder(federation.root / "other"), roster=federation.roster)
    witness.admit(SITE, Admitted(head=seen, consistency=()))
    witness.admit(SITE, body)
    head = open_head(body.head.encode(), owner=SITE, signed_by=federation.roster.key_of(SITE))
    assert head.entries == len(federation.entries(SITE))


def test_a_site_records_where_the_coordinator_s_ledger_stands_once_a_state(federation, job, admitted):
    for _ in range(2):
        told(federation, admitted, federation.admission(job))
    (checkpoint,) = [entry.body for entry in federation.entries(SITE) if isinstance(entry.body, Checkpoint)]
    assert checkpoint == Checkpoint(owner=COORDINATOR, head=federation.coordinator_head())


@pytest.mark.parametrize("members", [True, False], ids=["members kept", "members put back"])
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_a_site_with_an_older_copy_of_its_ledger_takes_part_in_nothing(federation, job, members, kept, caplog):
    with federation.site() as site:
        told(federation, site, federation.admission(job))
        body = told(federation, site, federation.question(job, ask("centre")))
    path = federation.ledger(SITE)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    if not members:
        (federation.folder(SITE) / "members.json").unlink()
    shown = federation.admission(federation.job(nonce="next"), seen=body.head)
    with federation.site() as site:
        code, reason, log = refusal_and_log(federation, site, shown, caplog)
    assert code == "ledger"
    assert f"has {kept} entries, and the coordinator has seen 6" in log
    assert "restore the newest copy; nothing was charged" in log
    assert str(federation.root) not in reason


@pytest.mark.parametrize("signer", ["coordinator", "stranger", "another site"])
def test_a_head_that_the_site_never_signed_is_refused(federation, job, signer):
    keys = {"coordinator": federation.coordinator_key, "stranger": KEY, "another site": federation.site_keys[NAMES[1]]}
    with federation.site() as site:
        shown = federation.admission(job, seen=head_over([b"line"], key=keys[signer]))
        code, reason = refusal(federation, site, shown)
    assert code == "malformed"
    assert "signed by key" in reason


@pytest.mark.parametrize(
    ("owner", "lines"),
    [(NAMES[1], [b"line"]), (SITE, [b"line"]), (SITE, [b"line"] * 1000)],
    ids=["other", "fork", "long"],
)
def test_a_head_of_another_ledger_is_refused_even_under_the_site_s_own_key(federation, job, owner, lines):
    with federation.site() as site:
        shown = federation.admission(job, seen=head_over(lines, owner=owner, key=federation.site_keys[SITE]))
        code, _ = refusal(federation, site, shown)
    assert code == "ledger"


@pytest.mark.parametrize("sealed", ["", "{}", "\n", "x" * 10_000])
def test_a_coordinator_without_a_head_is_refused(federation, job, sealed):
    with federation.site() as site:
        code, _ = refusal(federation, site, federation.admission(job, ledger=sealed))
    assert code == "malformed"


@pytest.mark.parametrize(("entries", "accepted"), [(2, False), (3, True), (4, True)])
def test_a_coordinator_s_ledger_may_not_shrink(federation, job, entries, accepted):
    def shown(size):
        sealed = head_over([b"line"] * size, owner=COORDINATOR, key=federation.coordinator_key)
        return federation.admission(job, ledger=sealed)

    with federation.site() as site:
        told(federation, site, shown(3))
        if accepted:
            assert isinstance(told(federation, site, shown(entries)), Admitted)
            return
        code, reason = refusal(federation, site, shown(entries))
    assert code == "stale"
    assert "has 2 entries; this site saw 3 of it" in reason
    assert "restore its newest copy" in reason


def test_a_coordinator_s_ledger_of_the_same_size_must_be_the_same(federation, job):
    with federation.site() as site:
        for line in (b"one", b"two"):
            sealed = head_over([line], owner=COORDINATOR, key=federation.coordinator_key)
            answer = told(federation, site, federation.admission(job, ledger=sealed))
    assert answer.code == "stale"
    assert "it was rolled back or rewritten" in answer.reason


def test_what_a_site_saw_of_the_coordinator_survives_a_restart(federation, job):
    for size, kind in ((3, "admitted"), (2, "refusal")):
        sealed = head_over([b"line"] * size, owner=COORDINATOR, key=federation.coordinator_key)
        with federation.site() as site:
            assert told(federation, site, federation.admission(job, ledger=sealed)).kind == kind


# --- what a coordinator leaves out ---------------------------------------------------------------------------------


def meddled(federation, change):
    """The liar's replies with ``change`` having the last word on their signed bodies."""

    def meddle(_, reply):
        opened = federation.opened(reply, name=LIAR)
        body = change(opened.document.body)
        return write_message(
            replace(opened.document, body=body), tensors=opened.tensors, key=federation.site_keys[LIAR]
        )

    return liar_alone(meddle)


def spoilt_proofs():
    return {
        "forged": lambda proof: ("0" * 64, *proof[1:]),
        "cut": lambda proof: proof[:-1],
        "none": lambda _: (),
        "long": lambda proof: (*proof, *["0" * 64] * 10_000),
        "text": lambda _: ("zz",),
        "spaced": lambda proof: (" " + proof[0], *proof[1:]),
    }


@pytest.mark.parametrize("name", spoilt_proofs())
def test_a_site_that_cannot_prove_that_its_ledger_grew_stays_out(federation, job, name, caplog):
    federation.run_in_process(federation.job(with_privacy(rounds=1), nonce="first"))
    kept = federation.witness().seen(LIAR)

    def change(body):
        if isinstance(body, Admitted):
            return replace(body, consistency=spoilt_proofs()[name](body.consistency))
        return body

    with caplog.at_level(logging.WARNING):
        trained_without(federation, job, meddled(federation, change))
    assert f"site {LIAR} stays out: " in caplog.text
    assert federation.witness().seen(LIAR) == kept


def test_a_site_that_rewrote_its_ledger_with_its_own_key_stays_out_and_is_named(federation, job):
    """Its own software would refuse, so it runs another: head and proof are those of the ledger that it made up."""
    federation.run_in_process(federation.job(with_privacy(rounds=1), nonce="first"))
    lines = federation.ledger(LIAR).read_bytes().splitlines()
    made_up = [line for number, line in enumerate(lines) if number != 4] + [b"more"] * 20

    def change(body):
        if not isinstance(body, Admitted):
            return body
        proof = tree_over(made_up).consistency(older=len(lines))
        head = head_over(made_up, owner=LIAR, key=federation.site_keys[LIAR], time="2026-09-01T12:00:00.000000+00:00")
        return Admitted(head=head, consistency=tuple(node.hex() for node in proof))

    trained_without(federation, job, meddled(federation, change))
    alone = federation.job(replace(job.spec, aggregation=replace(job.spec.aggregation, minimum_sites=3)))
    with pytest.raises(RoundFailed, match=rf"{LIAR} stays out: .*rewritten or rolled back since entry {len(lines)} "):
        run(federation, alone, meddled(federation, change))


@pytest.mark.parametrize("owner", [NAMES[0], SiteId("coordinator")])
def test_a_site_that_shows_the_head_of_another_s_ledger_stays_out(federation, job, owner):
    def change(body):
        if not isinstance(body, Admitted):
            return body
        return replace(body, head=head_over([b"line"], owner=owner, key=federation.site_keys[LIAR]))

    trained_without(federation, job, meddled(federation, change))


def test_a_head_by_another_key_keeps_its_site_out(federation, job):
    def change(body):
        return replace(body, head=head_over([b"line"], owner=LIAR)) if isinstance(body, Admitted) else body

    trained_without(federation, job, meddled(federation, change))


@pytest.mark.parametrize("which", ["none", "garbage", "of another line", "of another size", "of another ledger"])
def test_a_contribution_whose_head_does_not_end_in_its_receipt_does_not_count(federation, job, which):
    key = federation.site_keys[LIAR]

    def change(body):
        if not isinstance(body, Contribution):
            return body
        head = open_head(body.head.encode(), owner=LIAR, signed_by=key.public)
        other = {
            "of another line": replace(head, last_line="0" * 64),
            "of another size": replace(head, entries=head.entries + 1),
            "of another ledger": replace(head, owner=SITE),
        }
        sealed = {"none": "", "garbage": "\x00{"}.get(which) if which not in other else sign_head(other[which], key)
        return replace(body, head=sealed if isinstance(sealed, str) else sealed.decode())

    trained_without(federation, job, meddled(federation, change))


def test_two_heads_of_one_size_put_their_site_out_and_the_verifier_names_its_ledger(federation, job):
    def change(body):
        if not isinstance(body, Admitted):
            return body
        head = open_head(body.head.encode(), owner=LIAR, signed_by=federation.roster.key_of(LIAR))
        # Of the size that the ledger will have after the first contribution.
        fork = replace(head, entries=head.entries + 2)
        return replace(body, head=sign_head(fork, federation.site_keys[LIAR]).decode())

    run(federation, job, meddled(federation, change))
    assert set(federation.release(job).release.contributions) == set(HONEST)
    with pytest.raises(LedgerBroken, match=rf"ledger of {LIAR}: its first 6 entries .*rewritten or forked"):
        verify_federation(federation.root)


def test_what_was_kept_and_was_altered_since_stops_the_coordinator_at_once(federation, job):
    federation.run_in_process(federation.job(with_privacy(rounds=1), nonce="first"))
    path = federation.root / "coordinator" / "witnessed" / f"{SITE}.json"
    before = {name: federation.ledger(name).read_bytes() for name in NAMES}
    for content in (b"", b"{}", path.read_bytes()[:-1], path.read_bytes() + b" " * 5000, encode(KEY.public)):
        path.write_bytes(content)
        with pytest.raises(LedgerBroken, match=rf"witnessed head .*{SITE}\.json"):
            federation.run_in_process(job)
    assert {name: federation.ledger(name).read_bytes() for name in NAMES} == before


def test_what_was_kept_and_cannot_be_read_is_named(tmp_path):
    (tmp_path / f"{SITE}.json").mkdir()
    with pytest.raises(LedgerBroken, match=rf"witnessed head .*{SITE}\.json: cannot be read"):
        Witness(Folder(tmp_path), roster=ROSTER).seen(SITE)


def test_a_ledger_that_changes_while_it_is_verified_is_not_believed(federation):
    federation.coordinator_head()
    with pytest.raises(LedgerBroken, match="has changed while it was being verified"):
        require_coordinator_holds(federation.coordinator_ledger, MerkleTree().after(b"another"), {})


def test_a_coordinator_that_lost_what_it_had_seen_goes_on(federation, job):
    federation.run_in_process(federation.job(with_privacy(rounds=1), nonce="first"))
    for path in (federation.root / "coordinator" / "witnessed").iterdir():
        path.unlink()
    federation.run_in_process(job)
    assert verify_federation(federation.root).witnessed > 0


def test_sites_that_cannot_use_their_ledger_are_named_when_too_few_remain(federation, job):
    federation.run_in_process(federation.job(with_privacy(rounds=1), nonce="first"))
    for name in NAMES[1:]:
        path = federation.ledger(name)
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    with pytest.raises(
        RoundFailed, match=rf"admission: 1 sites answered.*{NAMES[1]}, {NAMES[2]} refused \(ledger\): .*in its log"
    ):
        federation.run_in_process(job)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_no_head_that_was_tampered_with_is_kept(tmp_path_factory, data):
    witness = Witness(Folder(tmp_path_factory.mktemp("witness")), roster=ROSTER)
    sealed = head_over([b"one", b"two"])
    at, letter = data.draw(st.integers(0, len(sealed) - 1)), data.draw(st.characters(codec="ascii"))
    changed = sealed[:at] + letter + sealed[at + 1 :]
    if json.loads(sealed) == _json_or_none(changed):
        return
    with pytest.raises(FedgradeError):
        witness.admit(SITE, Admitted(head=changed, consistency=()))
    assert witness.seen(SITE) == ""


def _json_or_none(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_a_proof_of_a_million_hashes_is_refused_unread():
    with pytest.raises(MessageRefused, match="at most 128 hashes"):
        _hashes(("0" * 64,) * 10**6)


def test_all_this_is_in_the_way_of_nobody_honest(federation, job):
    with federation.answers() as answers:
        federation.run(job, Meddled(answers, lambda _, __, reply: reply))
    proof = verify_federation(federation.root)
    stages, sites = job.plan.rounds + 2, len(NAMES)
    assert proof.witnessed == sites * (
        stages + 1 + 1
    )  # a receipt a stage, a checkpoint, and what the coordinator keeps
