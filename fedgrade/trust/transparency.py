"""A ledger as a Merkle tree: whoever keeps one short signed head can later ask for proof that nothing was rewritten.

The tree is that of RFC 6962 and RFC 9162 §2.1 (https://www.rfc-editor.org/rfc/rfc9162#section-2.1) with SHA-256, one
leaf a ledger line without its newline: the bytes that the chain hashes and a receipt repeats. A :class:`TreeHead` says
where a ledger stood; :func:`require_consistent` holds a newer one against an older one with a proof of some
seventeen hashes at 10⁵ entries. No file, no clock, no network.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

from fedgrade.errors import DocumentRefused, LedgerBroken
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import PublicKey, SigningKey, SiteId, site_id
from fedgrade.trust.records import SHA256, UTC_TIME, LedgerState

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
MAX_ENTRIES = 2**63 - 1
MAX_HEAD_BYTES = 2**12


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
        peaks, node, height = [*self.peaks], leaf_hash(line), self.entries
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


class GrowingTree:
    """The tree over a ledger that is being written, with every full subtree of it kept: 64 bytes an entry.

    Roots of earlier sizes, and proofs from them, take some log² hashes of the number of entries.
    """

    def __init__(self) -> None:
        # Level 0 holds the leaves, each level above the nodes over pairs of the one below, 32 bytes each.
        self._levels: list[bytearray] = [bytearray()]

    @property
    def entries(self) -> int:
        """How many lines it is over."""
        return len(self._levels[0]) // HASH_BYTES

    def append(self, line: bytes) -> None:
        """Add ``line``, without its newline, as the next leaf."""
        node, level = leaf_hash(line), 0
        self._levels[0] += node
        while len(self._levels[level]) // HASH_BYTES % 2 == 0:
            node = node_hash(bytes(self._levels[level][-2 * HASH_BYTES : -HASH_BYTES]), node)
            level += 1
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += node

    def root(self, entries: int) -> bytes:
        """The root over the first ``entries`` lines, 32 bytes.

        Raises:
            LedgerBroken: there are not so many.
        """
        self._require(entries)
        return self._over(0, entries) if entries else EMPTY_ROOT

    def consistency(self, *, older: int) -> tuple[bytes, ...]:
        """The hashes that show the first ``older`` lines to be the start of them all (RFC 9162 §2.1.4.1).

        Empty for all of them, and for none of them, which is the start of everything.

        Raises:
            LedgerBroken: there are not so many.
        """
        self._require(older)
        proof: list[bytes] = []
        start, stop = 0, self.entries
        while 0 < older < stop:
            middle = start + _largest_power_below(stop - start)
            if older <= middle:
                proof.append(self._over(middle, stop))
                stop = middle
            else:
                proof.append(self._over(start, middle))
                start = middle
        if start:  # the verifier knows the older root, not that of this part of it
            proof.append(self._over(start, stop))
        return tuple(reversed(proof))

    def _require(self, entries: int) -> None:
        if not 0 <= entries <= self.entries:
            raise LedgerBroken(f"ledger: {str(entries)[:40]} entries are not among its {self.entries}")

    def _over(self, start: int, stop: int) -> bytes:
        """The node over leaves ``start`` to ``stop``, where RFC 9162 would split the tree."""
        count = stop - start
        if count & (count - 1) == 0:
            level = count.bit_length() - 1
            at = (start >> level) * HASH_BYTES
            return bytes(self._levels[level][at : at + HASH_BYTES])
        middle = start + _largest_power_below(count)
        return node_hash(self._over(start, middle), self._over(middle, stop))


@dataclass(frozen=True, kw_only=True)
class TreeHead:
    """Where the ledger of ``owner`` stood: how many entries, the tree's root over them, and the last line's digest.

    ``time`` is that of the last entry (UTC, ISO 8601 with microseconds), so that one state of a ledger has one head;
    hashes are 64 lower-case hexadecimal digits.
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
            if not SHA256.fullmatch(getattr(self, name)):
                raise DocumentRefused(f"tree head: {name} {getattr(self, name)[:80]!r} is no SHA-256 in hexadecimal")
        if not UTC_TIME.fullmatch(self.time):
            raise DocumentRefused(f"tree head: time {self.time[:40]!r} is no UTC time with microseconds")

    @property
    def state(self) -> LedgerState:
        """Size and root alone: what others write down of it."""
        return LedgerState(entries=self.entries, root=self.root)


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


def require_consistent(older: TreeHead, newer: TreeHead, proof: Sequence[bytes]) -> None:
    """Return if the ledger at ``newer`` is the ledger at ``older`` with nothing but entries added at its end.

    Guarantee: for a ledger that was rewritten, finding a ``proof`` that passes takes a SHA-256 collision.

    Raises:
        LedgerBroken: names both sizes, and what does not hold: another owner, fewer entries than before, an earlier
            time, or another history.
    """
    where = f"ledger of {older.owner}: {older.entries} entries before, {newer.entries} now"
    if newer.owner != older.owner:
        raise LedgerBroken(f"{where}, but those of {newer.owner}: heads of two ledgers")
    if newer.entries < older.entries:
        raise LedgerBroken(f"{where}: it was rolled back")
    if newer.time < older.time:
        raise LedgerBroken(f"{where}: the larger head is of {newer.time}, before the smaller of {older.time}")
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
