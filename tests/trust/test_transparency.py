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
    MerkleTree,
    TreeHead,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    open_head,
    require_consistent,
    require_included,
    sign_head,
    tree_over,
)

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
SITE = SiteId("site-1")
LARGEST = 70
LINES = tuple(b"entry %d" % number for number in range(LARGEST))
LEAVES = tuple(leaf_hash(line) for line in LINES)

sizes = st.integers(1, LARGEST)


def head(entries, lines=LINES, *, time="2026-07-01T12:00:00.000000+00:00"):
    return TreeHead(
        owner=SITE,
        entries=entries,
        root=tree_over([leaf_hash(line) for line in lines[:entries]]).root.hex(),
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


def naive_path(m, lines):
    if len(lines) == 1:
        return ()
    k = split(len(lines))
    if m < k:
        return (*naive_path(m, lines[:k]), naive_root(lines[k:]))
    return (*naive_path(m - k, lines[k:]), naive_root(lines[:k]))


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
    leaves = [leaf_hash(line) for line in lines]
    for case in published["inclusion"]:
        proof = inclusion_proof(leaves[: case["entries"]], index=case["index"])
        assert [node.hex() for node in proof] == case["proof"]
        require_included(lines[case["index"]], index=case["index"], head=head(case["entries"], lines), proof=proof)
    for case in published["consistency"]:
        proof = consistency_proof(leaves[: case["newer"]], older=case["older"])
        assert [node.hex() for node in proof] == case["proof"]
        require_consistent(head(case["older"], lines), head(case["newer"], lines), proof)


def test_streaming_gives_the_root_of_the_definition_at_every_size():
    tree = MerkleTree()
    for entries in range(LARGEST + 1):
        assert tree.root == naive_root(LINES[:entries]) == tree_over(LEAVES[:entries]).root
        assert len(tree.peaks) <= entries.bit_length()
        tree = tree.after(LINES[entries % LARGEST])


@given(st.lists(st.binary(max_size=4), max_size=LARGEST))
def test_any_lines_have_the_root_of_the_definition(lines):
    assert tree_over(leaf_hash(line) for line in lines).root == naive_root(tuple(lines))


def test_every_entry_at_every_size_has_the_proof_of_the_definition_and_it_is_believed():
    for entries in range(1, LARGEST + 1):
        for index in range(entries):
            proof = inclusion_proof(LEAVES[:entries], index=index)
            assert proof == naive_path(index, LINES[:entries])
            require_included(LINES[index], index=index, head=HEADS[entries], proof=proof)


def test_every_pair_of_sizes_has_the_proof_of_the_definition_and_it_is_believed():
    for newer in range(1, LARGEST + 1):
        for older in range(1, newer + 1):
            proof = consistency_proof(LEAVES[:newer], older=older)
            assert proof == naive_subproof(older, LINES[:newer], True)
            require_consistent(HEADS[older], HEADS[newer], proof)


def test_a_hundred_thousand_entries_are_held_in_seventeen_hashes_and_proved_with_no_more():
    leaves = [leaf_hash(b"%d" % number) for number in range(100_000)]
    assert len(tree_over(leaves).peaks) == (100_000).bit_count()
    assert len(inclusion_proof(leaves, index=77_777)) <= 17
    assert len(consistency_proof(leaves, older=99_999)) <= 18


def test_nothing_is_the_start_of_everything():
    assert MerkleTree().root == EMPTY_ROOT
    assert consistency_proof(LEAVES, older=0) == consistency_proof([], older=0) == ()


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


@given(st.data(), sizes)
def test_a_spoilt_proof_shows_no_entry_to_be_there(data, entries):
    index = data.draw(st.integers(0, entries - 1))
    proof = spoilt(data, inclusion_proof(LEAVES[:entries], index=index))
    with pytest.raises(LedgerBroken, match=f"entry {index} of its {entries}"):
        require_included(LINES[index], index=index, head=HEADS[entries], proof=proof)


@given(st.data(), sizes)
def test_a_proof_is_for_one_line_at_one_place(data, entries):
    index, other = (data.draw(st.integers(0, entries - 1)) for _ in range(2))
    assume(index != other)
    proof = inclusion_proof(LEAVES[:entries], index=index)
    for line, place in ((LINES[other], index), (LINES[index], other), (LINES[index] + b"\n", index)):
        with pytest.raises(LedgerBroken):
            require_included(line, index=place, head=HEADS[entries], proof=proof)


def test_the_inside_of_a_tree_does_not_pass_for_a_line():
    two = LEAVES[0] + LEAVES[1]
    proof = inclusion_proof(LEAVES[:4], index=0)
    with pytest.raises(LedgerBroken):
        require_included(two, index=0, head=HEADS[4], proof=proof[1:])
    with pytest.raises(LedgerBroken):
        require_included(two, index=0, head=replace(HEADS[4], entries=2), proof=proof[1:])


@given(st.data(), sizes, sizes)
def test_a_spoilt_proof_shows_no_growth(data, one, other):
    older, newer = sorted((one, other))
    proof = spoilt(data, consistency_proof(LEAVES[:newer], older=older))
    with pytest.raises(LedgerBroken, match=f"{older} entries before, {newer} now: .*rewritten or forked"):
        require_consistent(HEADS[older], HEADS[newer], proof)


@given(st.data(), sizes, sizes)
def test_a_ledger_rewritten_before_the_older_head_cannot_show_growth(data, one, other):
    older, newer = sorted((one, other))
    altered = data.draw(st.integers(0, older - 1))
    lines = [*LINES[:altered], b"another entry", *LINES[altered + 1 : newer]]
    proof = consistency_proof([leaf_hash(line) for line in lines], older=older)
    with pytest.raises(LedgerBroken, match=f"{older} entries before, {newer} now"):
        require_consistent(HEADS[older], head(newer, lines), proof)


@given(sizes, sizes, sizes)
def test_a_proof_between_two_sizes_is_none_from_a_third(one, other, third):
    older, newer = sorted((one, other))
    assume(third <= newer and third != older)
    with pytest.raises(LedgerBroken):
        require_consistent(HEADS[third], HEADS[newer], consistency_proof(LEAVES[:newer], older=older))


@given(sizes, sizes)
def test_a_ledger_that_lost_entries_was_rolled_back(one, other):
    assume(one != other)
    older, newer = sorted((one, other))
    with pytest.raises(LedgerBroken, match=f"{newer} entries before, {older} now: it was rolled back"):
        require_consistent(HEADS[newer], HEADS[older], consistency_proof(LEAVES[:newer], older=older))


def test_two_heads_of_one_size_must_be_the_same_head():
    require_consistent(HEADS[5], HEADS[5], ())
    for other in (head(5, (*LINES[:4], b"another")), replace(HEADS[5], last_line="0" * 64)):
        with pytest.raises(LedgerBroken, match="5 entries before, 5 now"):
            require_consistent(HEADS[5], other, ())
    with pytest.raises(LedgerBroken, match="5 entries before, 5 now"):
        require_consistent(HEADS[5], HEADS[5], [LEAVES[0]])


def test_heads_of_two_ledgers_or_out_of_time_are_not_compared():
    proof = consistency_proof(LEAVES[:7], older=4)
    with pytest.raises(LedgerBroken, match="4 entries before, 7 now, but those of site-2"):
        require_consistent(HEADS[4], replace(HEADS[7], owner=SiteId("site-2")), proof)
    with pytest.raises(LedgerBroken, match="signed at 2026-06-30"):
        require_consistent(HEADS[4], head(7, time="2026-06-30T12:00:00.000000+00:00"), proof)


@pytest.mark.parametrize("count", [0, 3, 64, 10_000])
def test_proofs_of_any_length_end_in_one_refusal(count):
    with pytest.raises(LedgerBroken):
        require_included(LINES[3], index=3, head=HEADS[70], proof=[LEAVES[0]] * count)
    with pytest.raises(LedgerBroken):
        require_consistent(HEADS[3], HEADS[70], [LEAVES[0]] * count)
    most = replace(HEADS[70], entries=MAX_ENTRIES)
    with pytest.raises(LedgerBroken):
        require_consistent(HEADS[70], most, [LEAVES[0]] * count)


@pytest.mark.parametrize("index", [-1, 5, 10**100])
def test_a_place_outside_the_ledger_has_no_proof(index):
    with pytest.raises(LedgerBroken, match="not one of 5"):
        inclusion_proof(LEAVES[:5], index=index)
    with pytest.raises(LedgerBroken, match="not one of its 5"):
        require_included(LINES[0], index=index, head=HEADS[5], proof=())


@pytest.mark.parametrize("older", [-1, 6, 10**100])
def test_a_ledger_does_not_grow_out_of_a_larger_one(older):
    with pytest.raises(LedgerBroken, match="not among 5"):
        consistency_proof(LEAVES[:5], older=older)


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
