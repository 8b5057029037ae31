"""What each side saw of the other's ledger, held against that ledger: a rollback or rewriting by one shows at once.

The coordinator's ledger says where each site's stood after every receipt; a site's says, under the coordinator's own
signature, where the coordinator's stood when it was shown a job. Beside it lies the newest head of each site's ledger.
And a site that was asked for one stage of a job proves that the stages before it were closed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgrade.errors import LedgerBroken
from fedgrade.federation.rounds import Stage, stages_of
from fedgrade.federation.site_proof import SiteProof
from fedgrade.federation.witness import head_file, read_head
from fedgrade.trust.identity import Roster, SiteId
from fedgrade.trust.ledger import Entry, roots_at
from fedgrade.trust.records import RoundClosed
from fedgrade.trust.transparency import MerkleTree


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A ledger was seen with ``entries`` entries under ``root``; ``witness`` says where that is written."""

    entries: int
    root: str
    witness: str


def claims_in(path: Path, entry: Entry) -> Iterator[tuple[SiteId, Claim]]:
    """What ``entry`` of the coordinator's ledger at ``path`` claims about the ledgers of sites."""
    if isinstance(entry.body, RoundClosed):
        for site, state in entry.body.ledgers.items():
            witness = f"ledger {path}: entry {entry.sequence}"
            yield site, Claim(entries=state.entries, root=state.root, witness=witness)


def kept_claims(folder: Path, sites: Iterable[SiteId], roster: Roster) -> Iterator[tuple[SiteId, Claim]]:
    """The newest heads that the coordinator keeps in ``folder`` of the ledgers of ``sites``, where there are any.

    Raises:
        LedgerBroken: one does not verify.
    """
    for site in sites:
        path = head_file(folder, site)
        if path.exists():
            head, _ = read_head(path, site=site, roster=roster)
            yield site, Claim(entries=head.entries, root=head.root, witness=f"witnessed head {path}")


def require_sites_hold(sites: Mapping[SiteId, SiteProof], claims: Mapping[SiteId, list[Claim]]) -> int:
    """Return how many of ``claims`` are about a ledger that is here, all of which hold.

    Raises:
        LedgerBroken: names the first that does not.
    """
    held = 0
    for site, proof in sites.items():
        for claim in claims.get(site, ()):
            _require(claim, of=f"ledger of {site}", entries=proof.entries, roots=proof.roots)
            held += 1
    return held


def require_coordinator_holds(path: Path, tree: MerkleTree, sites: Mapping[SiteId, SiteProof]) -> int:
    """Return how many heads of the coordinator's ledger at ``path`` the ledgers of ``sites`` record, all of which hold.

    Args:
        path: the ledger, verified before.
        tree: what it was found to be then.
        sites: what the sites' ledgers prove.

    Raises:
        LedgerBroken: names the first that does not, or the ledger has changed since it was verified.
    """
    claims = [
        Claim(entries=head.entries, root=head.root, witness=f"entry {sequence} of the ledger of {site}")
        for site, proof in sites.items()
        for sequence, head in proof.checkpoints.items()
    ]
    # A second look, hashes alone: which sizes matter is known only once the sites' ledgers were read.
    roots = roots_at(path, sizes={tree.entries, *(claim.entries for claim in claims)})
    if roots.get(tree.entries) != tree.root.hex():
        raise LedgerBroken(f"ledger {path}: has changed while it was being verified; verify again")
    for claim in claims:
        _require(claim, of=f"ledger {path}", entries=tree.entries, roots=roots)
    return len(claims)


def require_stages_closed(sites: Mapping[SiteId, SiteProof], rounds: Mapping[str, Sequence[RoundClosed]]) -> None:
    """Return if the coordinator closed every stage of a job that came before one that some site charged for.

    A stage is asked for only once the stage before it stands in the coordinator's ledger, with or without this site.
    So a job may be ahead of ``rounds`` by its open stage alone, with any number of attempts: a crash leaves that, and
    so does a run that was given up for good, be it in its first stage. A job that was admitted and never charged, or
    admitted by a site that stayed silent, says nothing.

    Args:
        sites: what the sites' ledgers prove; those that are not here say nothing.
        rounds: what the coordinator's ledger closed of each job: the job's own stages, from the first on.

    Raises:
        LedgerBroken: names the site, the entry and the job.
    """
    places: dict[str, dict[Stage, int]] = {}
    for site, proof in sites.items():
        for sequence, charge in proof.charges.items():
            body, closed = charge.reserve, len(rounds.get(charge.reserve.job, ()))
            if body.job not in places:
                places[body.job] = {stage: place for place, stage in enumerate(stages_of(proof.jobs[body.job]))}
            if places[body.job][Stage(purpose=body.purpose, round_index=body.round_index)] > closed:
                raise LedgerBroken(
                    f"ledger of {site}: entry {sequence}: charges {body.purpose} round {body.round_index} of job "
                    f"{body.job[:16]}, which is asked for only after stage {closed + 1} was closed; the coordinator's "
                    "ledger does not have it: it was rolled back"
                )


def _require(claim: Claim, *, of: str, entries: int, roots: Mapping[int, str]) -> None:
    if claim.entries > entries:
        raise LedgerBroken(
            f"{of}: has {entries} entries; {claim.witness} saw {claim.entries} under root {claim.root[:16]}: it was "
            "rolled back, or this is not its newest copy"
        )
    if roots[claim.entries] != claim.root:
        raise LedgerBroken(
            f"{of}: its first {claim.entries} entries have root {roots[claim.entries][:16]}; {claim.witness} saw "
            f"{claim.root[:16]}: it was rewritten or forked"
        )
