"""A ledger as a Merkle tree: whoever keeps one short signed head can later ask for proof that nothing was rewritten.

The tree is that of RFC 6962 and RFC 9162 §2.1 (https://www.rfc-editor.org/rfc/rfc9162#section-2.1) with SHA-256, one
leaf a ledger line without its newline: the bytes that the chain hashes and a receipt repeats. A :class:`TreeHead` says
where a ledger stood; :func:`require_consistent` holds a newer one against an older one with a proof of some
seventeen hashes at 10⁵ entries. Pure values and functions: no file, no clock, no network.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

from fedgrade.errors import DocumentRefused, LedgerBroken
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import PublicKey, SigningKey, SiteId, site_id
from fedgrade.trust.ledger import UTC_TIME

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
MAX_ENTRIES = 2**63 - 1
MAX_HEAD_BYTES = 2**12
_SHA256 = re.compile(r"[0-9a-f]{64}")


def leaf_hash(line: bytes) -> bytes:
    """The leaf of a ledger line, given without its newline: SHA-256(0x00 ‖ line), 32 bytes."""
    return hashlib.sha256(b"\x00" + line).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The node above two subtrees: SHA-256(0x01 ‖ left ‖ right), 32 bytes.

    The first byte differs from a leaf's, so that no line can be made to look like the inside of a tree.
    """
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, kw_only=True)
class MerkleTree:
    """The tree over the first ``entries`` lines, in O(log entries) memory.

    ``peaks`` are the roots of its full subtrees, largest first, 32 bytes each: one a set bit of ``entries``.
    """

    entries: int = 0
    peaks: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.entries < 0 or len(self.peaks) != self.entries.bit_count():
            raise LedgerBroken(
                f"tree of {self.entries} entries: {len(self.peaks)} subtrees; {self.entries.bit_count()} are expected"
            )

    def after(self, line: bytes) -> "MerkleTree":
        """The tree once ``line``, without its newline, is appended."""
        return self.after_leaf(leaf_hash(line))

    def after_leaf(self, leaf: bytes) -> "MerkleTree":
        """The tree once the line of hash ``leaf`` is appended."""
        peaks, node, height = [*self.peaks], leaf, self.entries
        # Adding one to a binary number: each carry joins two full subtrees of one size.
        while height & 1:
            node, height = node_hash(peaks.pop(), node), height >> 1
        return MerkleTree(entries=self.entries + 1, peaks=(*peaks, node))

    @property
    def root(self) -> bytes:
        """The 32 bytes that stand for every line and their order; SHA-256 of nothing for the empty tree."""
        if not self.peaks:
            return EMPTY_ROOT
        *larger, smallest = self.peaks
        return reduce(lambda right, left: node_hash(left, right), reversed(larger), smallest)


def tree_over(leaves: Iterable[bytes]) -> MerkleTree:
    """The tree over ``leaves``, each a :func:`leaf_hash`, in order."""
    return reduce(MerkleTree.after_leaf, leaves, MerkleTree())


def inclusion_proof(leaves: Sequence[bytes], *, index: int) -> tuple[bytes, ...]:
    """The hashes, lowest first, that lead from leaf ``index`` to the root over ``leaves`` (RFC 9162 §2.1.3.1).

    Raises:
        LedgerBroken: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise LedgerBroken(f"inclusion proof: entry {index} is not one of {len(leaves)}")
    proof: list[bytes] = []
    start, stop = 0, len(leaves)
    while stop - start > 1:
        middle = start + _largest_power_below(stop - start)
        if index < middle:
            proof.append(tree_over(leaves[middle:stop]).root)
            stop = middle
        else:
            proof.append(tree_over(leaves[start:middle]).root)
            start = middle
    return tuple(reversed(proof))


def consistency_proof(leaves: Sequence[bytes], *, older: int) -> tuple[bytes, ...]:
    """The hashes that show the first ``older`` of ``leaves`` to be the start of them all (RFC 9162 §2.1.4.1).

    Empty for all of them, and for none of them, which is the start of everything.

    Raises:
        LedgerBroken: there are not so many leaves.
    """
    if not 0 <= older <= len(leaves):
        raise LedgerBroken(f"consistency proof: {older} entries are not among {len(leaves)}")
    proof: list[bytes] = []
    start, stop = 0, len(leaves)
    while 0 < older < stop:
        middle = start + _largest_power_below(stop - start)
        if older <= middle:
            proof.append(tree_over(leaves[middle:stop]).root)
            stop = middle
        else:
            proof.append(tree_over(leaves[start:middle]).root)
            start = middle
    if start:  # the verifier knows the older root, not that of this part of it
        proof.append(tree_over(leaves[start:stop]).root)
    return tuple(reversed(proof))


@dataclass(frozen=True, kw_only=True)
class TreeHead:
    """Where the ledger of ``owner`` stood: how many entries, the tree's root over them, and the last line's digest.

    ``time`` is when this was signed (UTC, ISO 8601 with microseconds); hashes are 64 lower-case hexadecimal digits.
    """

    schema: Literal["fedgrade/tree-head/1"] = "fedgrade/tree-head/1"
    owner: SiteId
    entries: int
    root: str
    last_line: str
    time: str

    def __post_init__(self) -> None:
        site_id(self.owner)
        # Every ledger begins with a genesis entry, so that a head over nothing says nothing.
        if not 1 <= self.entries <= MAX_ENTRIES:
            raise DocumentRefused(f"tree head: {str(self.entries)[:40]} entries; 1 to {MAX_ENTRIES} are possible")
        for name in ("root", "last_line"):
            if not _SHA256.fullmatch(getattr(self, name)):
                raise DocumentRefused(f"tree head: {name} {getattr(self, name)[:80]!r} is no SHA-256 in hexadecimal")
        if not UTC_TIME.fullmatch(self.time):
            raise DocumentRefused(f"tree head: time {self.time[:40]!r} is no UTC time with microseconds")


def sign_head(head: TreeHead, key: SigningKey) -> bytes:
    """The DSSE envelope around ``head``, by the key that signs the ledger's entries too."""
    return seal(head, key)


def open_head(raw: bytes, *, owner: SiteId, signed_by: PublicKey) -> TreeHead:
    """The head inside ``raw``, of the ledger of ``owner`` and signed by ``signed_by``.

    Raises:
        DocumentRefused: not a sealed tree head.
        SignatureRefused: signed by nobody, by someone else, or altered since.
        LedgerBroken: it is about the ledger of another.
    """
    head = open_sealed(raw, as_=TreeHead, signed_by=signed_by, limit=MAX_HEAD_BYTES)
    if head.owner != owner:
        raise LedgerBroken(f"tree head: of the ledger of {head.owner}; that of {owner} was asked for")
    return head


def require_included(line: bytes, *, index: int, head: TreeHead, proof: Sequence[bytes]) -> None:
    """Return if ``line``, without its newline, is entry ``index`` of the ledger that ``head`` is of.

    Guarantee: for another line or place, finding a ``proof`` that passes takes a SHA-256 collision (RFC 9162 §2.1.3.2).

    Raises:
        LedgerBroken: ``proof`` does not show it.
    """
    if not 0 <= index < head.entries:
        raise LedgerBroken(f"ledger of {head.owner}: entry {str(index)[:40]} is not one of its {head.entries}")
    node = leaf_hash(line)
    place, last = index, head.entries - 1
    for sibling in proof:
        if last == 0 or len(sibling) != HASH_BYTES:
            raise _not_included(index, head)
        if place & 1 or place == last:
            node = node_hash(sibling, node)
            place, last = _without_lone_levels(place, last)
        else:
            node = node_hash(node, sibling)
        place, last = place >> 1, last >> 1
    if last != 0 or node.hex() != head.root:
        raise _not_included(index, head)


def require_consistent(older: TreeHead, newer: TreeHead, proof: Sequence[bytes]) -> None:
    """Return if the ledger at ``newer`` is the ledger at ``older`` with nothing but entries added at its end.

    Guarantee: for a ledger that was rewritten, finding a ``proof`` that passes takes a SHA-256 collision.

    Raises:
        LedgerBroken: names both sizes, and what does not hold: another owner, fewer entries than before, an earlier
            signature, or another history.
    """
    where = f"ledger of {older.owner}: {older.entries} entries before, {newer.entries} now"
    if newer.owner != older.owner:
        raise LedgerBroken(f"{where}, but those of {newer.owner}: heads of two ledgers")
    if newer.entries < older.entries:
        raise LedgerBroken(f"{where}: it was rolled back")
    if newer.time < older.time:
        raise LedgerBroken(f"{where}: the larger head was signed at {newer.time}, before the smaller at {older.time}")
    if newer.entries == older.entries:
        consistent = not proof and (newer.root, newer.last_line) == (older.root, older.last_line)
    else:
        consistent = _joins(older, newer, proof)
    if not consistent:
        raise LedgerBroken(f"{where}: the proof does not show that it only grew; it was rewritten or forked")


def _joins(older: TreeHead, newer: TreeHead, proof: Sequence[bytes]) -> bool:
    """Whether ``proof`` leads to both roots; ``older`` is strictly smaller. RFC 9162 §2.1.4.2, step by step."""
    # A node of another length could shift the border between its neighbours under one and the same hash.
    if not proof or any(len(node) != HASH_BYTES for node in proof):
        return False
    full = older.entries.bit_count() == 1
    path = [bytes.fromhex(older.root), *proof] if full else [*proof]
    place, last = older.entries - 1, newer.entries - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    before = after = path[0]
    for node in path[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            before, after = node_hash(node, before), node_hash(node, after)
            place, last = _without_lone_levels(place, last)
        else:
            after = node_hash(after, node)
        place, last = place >> 1, last >> 1
    return last == 0 and (before.hex(), after.hex()) == (older.root, newer.root)


def _without_lone_levels(place: int, last: int) -> tuple[int, int]:
    """Up past the levels at which the last node has no sibling and is carried as it is."""
    while place and not place & 1:
        place, last = place >> 1, last >> 1
    return place, last


def _largest_power_below(count: int) -> int:
    """The largest power of two that is smaller than ``count``, which is at least 2: where RFC 9162 splits a tree."""
    return 1 << ((count - 1).bit_length() - 1)


def _not_included(index: int, head: TreeHead) -> LedgerBroken:
    return LedgerBroken(
        f"ledger of {head.owner}: the proof does not show this line to be entry {index} of its {head.entries}"
    )
