import hashlib
import json
from dataclasses import replace
from functools import cache

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import assume, given
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused, LedgerBroken, SignatureRefused
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.transparency import (
    EMPTY_ROOT,
    MAX_ENTRIES,
    MAX_HEAD_BYTES,
    GrowingTree,
    MerkleTree,
    TreeHead,
    leaf_hash,
    open_head,
    require_consistent,
    sign_head,
)

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
SITE = SiteId("site-1")
LARGEST = 70
LINES = tuple(b"entry %d" % number for number in range(LARGEST))
LEAVES = tuple(leaf_hash(line) for line in LINES)


def tree_over(lines):
    tree = GrowingTree()
    for line in lines:
        tree.append(line)
    return tree


def consistency(lines, older):
    return tree_over(lines).consistency(older=older)


WHOLE = tree_over(LINES)
sizes = st.integers(1, LARGEST)


def head(entries, lines=LINES, *, time="2026-07-01T12:00:00.000000+00:00"):
    return TreeHead(
        owner=SITE,
        entries=entries,
        root=tree_over(lines[:entries]).root(entries).hex(),
        last_line=hashlib.sha256(lines[entries - 1]).hexdigest(),
        time=time,
    )


HEADS = {entries: head(entries) for entries in range(1, LARGEST + 1)}


# --- RFC 9162 §2.1 once more, as it is written there: recursive, over slices of the leaves ----------------------------


def split(count):
    power = 1
    while power * 2 < count:
        power *= 2
    return power


@cache
def naive_root(lines):
    if not lines:
        return hashlib.sha256(b"").digest()
    if len(lines) == 1:
        return hashlib.sha256(b"\0" + lines[0]).digest()
    k = split(len(lines))
    return hashlib.sha256(b"\1" + naive_root(lines[:k]) + naive_root(lines[k:])).digest()


def naive_subproof(m, lines, whole):
    if m == len(lines):
        return () if whole else (naive_root(lines),)
    k = split(len(lines))
    if m <= k:
        return (*naive_subproof(m, lines[:k], whole), naive_root(lines[k:]))
    return (*naive_subproof(m - k, lines[k:], False), naive_root(lines[:k]))


# --- against the definition and the published tree -------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(request):
    return json.loads((request.path.parents[1] / "vectors" / "transparency.json").read_bytes())


def test_the_published_tree_has_the_published_roots_at_every_size(published):
    tree, roots = MerkleTree(), [MerkleTree().root.hex()]
    for leaf in published["leaves"]:
        tree = tree.after(bytes.fromhex(leaf))
        roots.append(tree.root.hex())
    assert roots == published["roots"]


def test_the_published_tree_has_the_published_proofs(published):
    lines = [bytes.fromhex(leaf) for leaf in published["leaves"]]
    for case in published["consistency"]:
        proof = consistency(lines[: case["newer"]], case["older"])
        assert [node.hex() for node in proof] == case["proof"]
        require_consistent(head(case["older"], lines), head(case["newer"], lines), proof)


def test_streaming_gives_the_root_of_the_definition_at_every_size():
    tree = MerkleTree()
    for entries in range(LARGEST + 1):
        assert tree.root == naive_root(LINES[:entries]) == WHOLE.root(entries)
        assert len(tree.peaks) <= entries.bit_length()
        tree = tree.after(LINES[entries % LARGEST])


@given(st.lists(st.binary(max_size=4), max_size=LARGEST))
def test_any_lines_have_the_root_of_the_definition(lines):
    assert tree_over(lines).root(len(lines)) == naive_root(tuple(lines))


def test_every_pair_of_sizes_has_the_proof_of_the_definition_and_it_is_believed():
    tree = GrowingTree()
    for newer in range(1, LARGEST + 1):
        tree.append(LINES[newer - 1])
        for older in range(1, newer + 1):
            proof = tree.consistency(older=older)
            assert proof == naive_subproof(older, LINES[:newer], True)
            require_consistent(HEADS[older], HEADS[newer], proof)


def test_a_hundred_thousand_entries_are_held_in_seventeen_hashes_and_proved_with_no_more():
    tree, streamed = GrowingTree(), MerkleTree()
    for number in range(100_000):
        tree.append(b"%d" % number)
        streamed = streamed.after(b"%d" % number)
    assert len(streamed.peaks) == (100_000).bit_count()
    assert tree.root(100_000) == streamed.root
    assert len(tree.consistency(older=99_999)) <= 18
    assert sum(len(level) for level in tree._levels) <= 64 * 100_000


def test_nothing_is_the_start_of_everything():
    assert MerkleTree().root == EMPTY_ROOT
    assert GrowingTree().root(0) == EMPTY_ROOT
    assert WHOLE.consistency(older=0) == GrowingTree().consistency(older=0) == ()


# --- what must not be believed ---------------------------------------------------------------------------------------


def spoilt(data, proof):
    """``proof`` with one thing wrong: a hash lost, added, altered, cut, lengthened, or out of its place."""
    at = data.draw(st.integers(0, max(0, len(proof) - 1)))
    ways = ["add"] + ["lose", "alter", "cut", "lengthen"] * bool(proof) + ["swap"] * (len(proof) > 1)
    way = data.draw(st.sampled_from(ways))
    changed = list(proof)
    match way:
        case "add":
            changed.insert(at, data.draw(st.sampled_from([bytes(32), EMPTY_ROOT, LEAVES[0]])))
        case "lose":
            changed.pop(at)
        case "alter":
            changed[at] = bytes([changed[at][0] ^ data.draw(st.integers(1, 255)), *changed[at][1:]])
        case "cut":
            changed[at] = changed[at][: data.draw(st.integers(0, 31))]
        case "lengthen":
            changed[at] += data.draw(st.binary(min_size=1, max_size=33))
        case "swap":
            changed[at], changed[at - 1] = changed[at - 1], changed[at]
    return changed


@given(st.data(), sizes, sizes)
def test_a_spoilt_proof_shows_no_growth(data, one, other):
    older, newer = sorted((one, other))
    proof = spoilt(data, consistency(LINES[:newer], older))
    with pytest.raises(LedgerBroken, match=f"{older} entries before, {newer} now: .*rewritten or forked"):
        require_consistent(HEADS[older], HEADS[newer], proof)


@given(st.data(), sizes, sizes)
def test_a_ledger_rewritten_before_the_older_head_cannot_show_growth(data, one, other):
    older, newer = sorted((one, other))
    altered = data.draw(st.integers(0, older - 1))
    lines = [*LINES[:altered], b"another entry", *LINES[altered + 1 : newer]]
    proof = consistency(lines, older)
    with pytest.raises(LedgerBroken, match=f"{older} entries before, {newer} now"):
        require_consistent(HEADS[older], head(newer, lines), proof)


@given(sizes, sizes, sizes)
def test_a_proof_between_two_sizes_is_none_from_a_third(one, other, third):
    older, newer = sorted((one, other))
    assume(third <= newer and third != older)
    with pytest.raises(LedgerBroken):
        require_consistent(HEADS[third], HEADS[newer], consistency(LINES[:newer], older))


@given(sizes, sizes)
def test_a_ledger_that_lost_entries_was_rolled_back(one, other):
    assume(one != other)
    older, newer = sorted((one, other))
    with pytest.raises(LedgerBroken, match=f"{newer} entries before, {older} now: it was rolled back"):
        require_consistent(HEADS[newer], HEADS[older], consistency(LINES[:newer], older))


def test_two_heads_of_one_size_must_be_the_same_head():
    require_consistent(HEADS[5], HEADS[5], ())
    for other in (head(5, (*LINES[:4], b"another")), replace(HEADS[5], last_line="0" * 64)):
        with pytest.raises(LedgerBroken, match="5 entries before, 5 now"):
            require_consistent(HEADS[5], other, ())
    with pytest.raises(LedgerBroken, match="5 entries before, 5 now"):
        require_consistent(HEADS[5], HEADS[5], [LEAVES[0]])


def test_heads_of_two_ledgers_or_out_of_time_are_not_compared():
    proof = consistency(LINES[:7], 4)
    with pytest.raises(LedgerBroken, match="4 entries before, 7 now, but those of site-2"):
        require_consistent(HEADS[4], replace(HEADS[7], owner=SiteId("site-2")), proof)
    with pytest.raises(LedgerBroken, match="of 2026-06-30"):
        require_consistent(HEADS[4], head(7, time="2026-06-30T12:00:00.000000+00:00"), proof)


@pytest.mark.parametrize("count", [0, 3, 64, 10_000])
def test_proofs_of_any_length_end_in_one_refusal(count):
    with pytest.raises(LedgerBroken):
        require_consistent(HEADS[3], HEADS[70], [LEAVES[0]] * count)
    most = replace(HEADS[70], entries=MAX_ENTRIES)
    with pytest.raises(LedgerBroken):
        require_consistent(HEADS[70], most, [LEAVES[0]] * count)


@pytest.mark.parametrize("older", [-1, 6, 10**100])
def test_a_ledger_does_not_grow_out_of_a_larger_one(older):
    with pytest.raises(LedgerBroken, match="not among its 5"):
        consistency(LINES[:5], older)


@pytest.mark.parametrize(("entries", "peaks"), [(-1, ()), (0, (LEAVES[0],)), (3, (LEAVES[0],))])
def test_a_tree_has_one_subtree_for_each_bit_of_its_size(entries, peaks):
    with pytest.raises(LedgerBroken, match=f"tree of {entries} entries"):
        MerkleTree(entries=entries, peaks=peaks)


# --- signed heads ----------------------------------------------------------------------------------------------------


def test_a_signed_head_on_the_wire(frozen):
    frozen("transparency-head.json", sign_head(HEADS[7], KEY))


@given(sizes)
def test_opening_gives_back_the_head_that_was_signed(entries):
    assert open_head(sign_head(HEADS[entries], KEY), owner=SITE, signed_by=KEY.public) == HEADS[entries]


def test_a_head_of_another_site_or_by_another_key_is_refused():
    with pytest.raises(LedgerBroken, match="of the ledger of site-1; that of site-2"):
        open_head(sign_head(HEADS[7], KEY), owner=SiteId("site-2"), signed_by=KEY.public)
    with pytest.raises(SignatureRefused):
        open_head(sign_head(HEADS[7], OTHER), owner=SITE, signed_by=KEY.public)


@pytest.mark.parametrize("raw", [b"", b"{}", seal(KEY.public, KEY), b" " * (MAX_HEAD_BYTES + 1)])
def test_what_is_no_sealed_head_is_refused(raw):
    with pytest.raises(DocumentRefused):
        open_head(raw, owner=SITE, signed_by=KEY.public)


@pytest.mark.parametrize(
    ("field", "impossible"),
    [
        ("owner", "Site 1"),
        ("entries", 0),
        ("entries", -1),
        ("entries", MAX_ENTRIES + 1),
        ("entries", 10**4000),
        ("entries", 1.0),
        ("root", "A" * 64),
        ("root", "a" * 63),
        ("last_line", "a" * 64 + "\n"),
        ("time", "yesterday"),
        ("time", "2026-07-01T12:00:00+00:00"),
        ("time", "2026-07-01T12:00:00.000000+02:00"),
    ],
)
def test_an_impossible_head_is_refused_in_one_line(field, impossible):
    document = {**json.loads(encode(HEADS[7])), field: impossible}
    with pytest.raises(DocumentRefused) as refusal:
        decode(TreeHead, json.dumps(document).encode())
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300
