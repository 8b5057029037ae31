"""Two ledgers that watch each other: a copy that was put back, or a history that was rewritten, does not pass.

At admission the coordinator shows a site the newest head of the site's ledger that it has seen, and the head of its
own. The site refuses if its ledger does not begin with the one or if the other shrank; the coordinator leaves a site
out that cannot prove that its ledger only grew. What each saw stands in its own ledger, where a verifier finds it.
"""

from pathlib import Path

from fedgrade.errors import DocumentRefused, FedgradeError, LedgerBroken, MessageRefused
from fedgrade.federation.messages import Admitted, Contribution
from fedgrade.federation.store import Documents
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import PublicKey, Roster, SiteId
from fedgrade.trust.records import COORDINATOR, SHA256, LedgerState
from fedgrade.trust.transparency import MAX_HEAD_BYTES, TreeHead, open_head, require_consistent

_PROOF_HASHES = 128  # twice the height of the largest tree


class Witness:
    """The newest head of every site's ledger that a coordinator has seen, a document a site, as the site sealed it."""

    def __init__(self, documents: Documents, *, roster: Roster) -> None:
        self.roster = roster
        self._documents = documents
        self._newest: dict[SiteId, tuple[TreeHead, str]] = {}

    def seen(self, site: SiteId) -> str:
        """The newest sealed head of the ledger of ``site``; empty if none was ever seen.

        Raises:
            LedgerBroken: what was kept does not verify.
        """
        if site not in self._newest:
            where = f"witnessed head {self._documents.where(_name(site))}"
            try:
                raw = self._documents.read(_name(site), limit=MAX_HEAD_BYTES)
            except DocumentRefused as error:
                raise LedgerBroken(f"witnessed head {error}") from error
            if raw is None:
                return ""
            self._newest[site] = _verified(raw, site=site, roster=self.roster, where=where)
        return self._newest[site][1]

    def admit(self, site: SiteId, body: Admitted) -> None:
        """Keep the head in ``body``, the ledger of ``site`` having only grown since the newest that was seen.

        Raises:
            LedgerBroken: it did not, or it is about another ledger.
            SignatureRefused, DocumentRefused, MessageRefused: head or proof is not what it must be.
        """
        head = self._opened(site, body.head)
        if self.seen(site):
            older, _ = self._newest[site]
            try:
                require_consistent(older, head, _hashes(body.consistency))
            except LedgerBroken as error:
                raise LedgerBroken(
                    f"its ledger was rewritten or rolled back since entry {older.entries} ({error})"
                ) from error
        self._keep(site, head, body.head)

    def receive(self, site: SiteId, body: Contribution, *, sequence: int, stood: LedgerState | None) -> LedgerState:
        """Keep the head in ``body``, whose last line is the receipt, entry ``sequence``; returns where it stands.

        Args:
            site: whose contribution it is.
            body: the contribution.
            sequence: the place in the ledger that the receipt names.
            stood: where the ledger stood after what this site contributed before. A job's stages follow each other,
                and so do their receipts, whether they are fresh or sent again.

        Raises:
            LedgerBroken: it is about another ledger, or that ledger was rolled back or forked.
            SignatureRefused, DocumentRefused, MessageRefused: it is no head, or ends in another line.
        """
        head = self._opened(site, body.head)
        if (head.last_line, head.entries) != (digest(body.receipt.encode()), sequence + 1):
            raise MessageRefused("the head of its ledger does not end in the receipt")
        if stood is not None and not follows(head.state, stood):
            raise LedgerBroken(
                f"its ledger was rewritten or rolled back since entry {stood.entries}: it ends at {head.entries} now"
            )
        if self.seen(site) and (newest := self._newest[site][0]).entries == head.entries and newest != head:
            raise LedgerBroken(f"its ledger was rewritten: two of its heads have {head.entries} entries")
        self._keep(site, head, body.head)
        return head.state

    def _opened(self, site: SiteId, sealed: str) -> TreeHead:
        return open_head(sealed.encode(), owner=site, signed_by=self.roster.key_of(site))

    def _keep(self, site: SiteId, head: TreeHead, sealed: str) -> None:
        """A reply that was sent again carries the head of its own time, which is not the newest."""
        if not self.seen(site) or head.entries > self._newest[site][0].entries:
            self._documents.write({_name(site): sealed.encode()})
            self._newest[site] = head, sealed


def head_file(folder: Path, site: SiteId) -> Path:
    """Where the folder of a witness has the newest head of the ledger of ``site``."""
    return folder / _name(site)


def read_head(path: Path, *, site: SiteId, roster: Roster) -> tuple[TreeHead, str]:
    """The head of the ledger of ``site`` in the file ``path``, and the text that it is sealed in.

    Raises:
        SignatureRefused: the roster does not name the site.
        LedgerBroken: it cannot be read, or is not such a head.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_HEAD_BYTES + 1)
    except OSError as error:
        raise LedgerBroken(f"witnessed head {path}: cannot be read ({error.strerror})") from error
    return _verified(raw, site=site, roster=roster, where=f"witnessed head {path}")


def require_growth(sealed: str, *, standing: str, coordinator: PublicKey) -> None:
    """Return if the head ``sealed`` of the coordinator's ledger may follow ``standing``, the last that a site recorded.

    Whether a larger ledger really begins with the smaller is for the verifier, who has it.

    Raises:
        MessageRefused: the ledger shrank, or is another of the same size.
        LedgerBroken, SignatureRefused, DocumentRefused: it is not a head of the coordinator's ledger.
    """
    head = open_head(sealed.encode(), owner=COORDINATOR, signed_by=coordinator)
    if not standing:
        return
    before = open_head(standing.encode(), owner=COORDINATOR, signed_by=coordinator)
    if not follows(head.state, before.state):
        raise MessageRefused(
            f"the coordinator's ledger has {head.entries} entries; this site saw {before.entries} of it, under root "
            f"{before.root[:16]}: it was rolled back or rewritten; restore its newest copy"
        )


def follows(state: LedgerState, before: LedgerState) -> bool:
    """Whether a ledger that stood at ``before`` may stand at ``state`` now: it grew, or is as it was."""
    return state.entries > before.entries or state == before


def _name(site: SiteId) -> str:
    return f"{site}.json"


def _verified(raw: bytes, *, site: SiteId, roster: Roster, where: str) -> tuple[TreeHead, str]:
    key = roster.key_of(site)
    try:
        return open_head(raw, owner=site, signed_by=key), raw.decode()
    except FedgradeError as error:
        raise LedgerBroken(
            f"{where}: {error}; take it away only if {site} has a new key and begins a new ledger"
        ) from error


def _hashes(proof: tuple[str, ...]) -> tuple[bytes, ...]:
    if len(proof) > _PROOF_HASHES or not all(SHA256.fullmatch(node) for node in proof):
        raise MessageRefused(f"proof of consistency: {len(proof)} texts; at most {_PROOF_HASHES} hashes are expected")
    return tuple(bytes.fromhex(node) for node in proof)
