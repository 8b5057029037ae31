"""Who would take part in a job, as the files of a federation have it: each verified, none locked or written."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

from fedgrade.errors import DocumentRefused, JobRefused
from fedgrade.federation.forecast import Standing
from fedgrade.federation.policy import Policy
from fedgrade.federation.site_proof import SiteProof, prove_site
from fedgrade.federation.verification import FederationProof, verify_federation
from fedgrade.trust.canonical import decode, decode_yaml
from fedgrade.trust.identity import Roster, SiteId, read_roster
from server.coordinator_folder import CoordinatorFolder

_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What is known of who would take part: their standings, and what was proved about the federation so far."""

    declared_items: dict[SiteId, int]
    standings: dict[SiteId, Standing]
    proof: FederationProof | None
    described: str


def read_surroundings(folder: Path) -> Surroundings:
    """Who would take part in a job of the federation in ``folder``, as its files have it, each verified.

    Every site on the roster takes part whose declared items are known: from its join request where partners are
    enrolled, elsewhere from its own ``site.yaml``, or from its ledger.

    Raises:
        DocumentRefused, LedgerBroken: a file cannot be read or does not verify.
    """
    roster = read_roster(folder / "roster.json")
    whole = (folder / "coordinator" / "ledger.jsonl").exists() and any(folder.glob("sites/*/ledger.jsonl"))
    proof = verify_federation(folder, roster=roster) if whole else None
    standings = {site: _standing(folder, site, roster, proof) for site in sorted(roster.sites)}
    own = CoordinatorFolder(root=folder)
    if own.book.exists():
        return _enrolled(own, standings, proof)
    declared = {site: one.declared_items for site, one in standings.items() if one.declared_items is not None}
    unknown = [site for site in standings if site not in declared]
    left_out = f"; left out, with neither site.yaml nor a charged ledger here: {', '.join(unknown)}" if unknown else ""
    return Surroundings(
        declared_items=declared, standings=standings, proof=proof, described=f"the sites of {folder}{left_out}"
    )


def _enrolled(
    folder: CoordinatorFolder, standings: dict[SiteId, Standing], proof: FederationProof | None
) -> Surroundings:
    """Partners on machines of their own: what each published of its size is in the coordinator's book."""
    from server.enrolment import read_book  # noqa: PLC0415 - X.509 takes a moment

    declared = {site: body.declared_items for site, body in sorted(read_book(folder).membership.current.items())}
    if not declared:
        raise JobRefused(f"{folder.root}: nobody is enrolled; put a partner on the roster with `fedgrade enrol`")
    unseen = [site for site in declared if standings[site].proof is None]
    uncounted = f"; what these spent before is not known, without a copy of their ledgers here: {', '.join(unseen)}"
    described = f"the {len(declared)} sites that are enrolled in {folder.root}{uncounted if unseen else ''}"
    return Surroundings(declared_items=declared, standings=standings, proof=proof, described=described)


def read_policy(path: Path) -> Policy:
    """A site's own policy file.

    Raises:
        DocumentRefused: unreadable, or not a policy.
    """
    return decode_yaml(Policy, _own_file(path, what="policy"), what=f"policy {path}")


def _standing(folder: Path, site: SiteId, roster: Roster, proof: FederationProof | None) -> Standing:
    """One site as its ``site.yaml`` has it; where only copies of its files lie here, as those do."""
    here = folder / "sites" / site
    if (here / "site.yaml").exists():
        settings = _Settings.read(here / "site.yaml")
        return Standing(
            policy=read_policy(here / settings.policy),
            proof=_ledger(here / settings.ledger, site, roster, proof),
            lineage=settings.lineage,
            cohorts={name: cohort.declared_items for name, cohort in settings.cohorts.items()},
            coordinator=roster.coordinator,
        )
    copied = Standing.of_ledger(
        _ledger(here / "ledger.jsonl", site, roster, proof),
        policy=read_policy(here / "policy.yaml") if (here / "policy.yaml").exists() else None,
    )
    return replace(copied, coordinator=roster.coordinator)


@dataclass(frozen=True, kw_only=True)
class _Cohort:
    """One batch of a site's items; the plan reads no manifest."""

    manifest: str
    declared_items: int


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a plan asks of a ``site.yaml``, which the site's own door reads in full."""

    policy: str
    ledger: str
    lineage: str
    cohorts: dict[str, "_Cohort"]

    @classmethod
    def read(cls, path: Path) -> Self:
        what = f"site file {path}"
        written = decode_yaml(dict[str, object], _own_file(path, what="site file"), what=what)
        wanted = {field.name: written.get(field.name) for field in fields(cls)}
        # Through the strict door once more, so that each has its type.
        return decode(cls, json.dumps(wanted).encode(), what=what)


def _own_file(path: Path, *, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise DocumentRefused(f"{what} {path}: cannot be read ({error.strerror})") from error


def _ledger(path: Path, site: SiteId, roster: Roster, proof: FederationProof | None) -> SiteProof | None:
    """What the ledger at ``path`` proves, unless that was proved already; None where there is none yet."""
    if not path.exists():
        return None
    if proof is not None and path.parent.name == site and path.name == "ledger.jsonl":
        return proof.sites[site]
    return prove_site(path, site=site, roster=roster)
