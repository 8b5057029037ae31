"""How a partner's folder comes to be and joins a coordinator: keys, settings, the join request, the bundle.

Nothing is overwritten that a person or a ledger depends on, and nothing of a coordinator's is believed before its
fingerprint was compared and its signature checked. Needs no torch.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from clients.leaving import take_back
from clients.node_key import create_node_key, next_node_key
from clients.settings import SiteFolder, SiteSettings, read_own_file, read_site
from clients.templates import PolicyValues, SiteValues, policy_yaml, quoted, site_yaml
from fedgrade.data.manifest import MAX_MANIFEST_BYTES, read_manifest
from fedgrade.errors import DocumentRefused, SignatureRefused
from fedgrade.federation.store import write_durably
from fedgrade.grading import GradeScale
from fedgrade.trust.canonical import decode_yaml, encode
from fedgrade.trust.enrolment import (
    MAX_PAPER_BYTES,
    JoinBundle,
    JoinRequest,
    read_bundle,
    utc_text,
    write_request,
)
from fedgrade.trust.identity import PublicKey, Roster, SigningKey, SiteId, read_roster, site_id

REQUEST: Final = "join-request.json"
BUNDLE: Final = "bundle.json"  # the newest that was taken
_SITE, _POLICY, _KEY, _NODE_KEY = "site.yaml", "policy.yaml", "key.pem", "node_key"
_ADDRESS: Final = re.compile(r'^(link:\n(?:[ ]+.*\n)*?[ ]+address:[ ]*)("(?:[^"\\]|\\.)*"|[^\s#]+)', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What a bundle changed for a site that took it.

    Attributes:
        bundle: the one that is in force now.
        arrived: sites that the roster held before did not name.
        left: sites that it named and the new one does not.
        moved: whether the coordinator's address or authority is another one than before.
        came_back: whether the site had left, and its leave notice was taken away.
    """

    bundle: JoinBundle
    arrived: tuple[SiteId, ...]
    left: tuple[SiteId, ...]
    moved: bool
    came_back: bool


def create_site(folder: Path, site: SiteValues, policy: PolicyValues, *, now: datetime) -> JoinRequest:
    """A partner's new files in ``folder``: two keys, ``site.yaml``, ``policy.yaml``, a signed ``join-request.json``.

    Raises:
        DocumentRefused: one of them exists already, or the values are no site's.
        DataRefused: the manifest is not one by these grades.
    """
    site_id(site.site)
    settings_text, policy_text = site_yaml(site), policy_yaml(policy)
    for name in (_KEY, _NODE_KEY, _NODE_KEY + ".pub", _SITE, _POLICY, REQUEST):
        if (folder / name).exists():
            raise DocumentRefused(f"{folder / name}: exists and is not overwritten; give another folder")
    _check_manifest(folder / site.manifest, policy.grades)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _all_or_nothing(folder):
        key = SigningKey.generate()
        key.save(folder / _KEY)
        create_node_key(folder / _NODE_KEY)
        write_durably(folder / _POLICY, policy_text.encode())
        # Last but one: a folder with a site.yaml is whole but for the request, which can be made anew.
        write_durably(folder / _SITE, settings_text.encode())
        return request_to_join(folder / _SITE, now=now)


def request_to_join(site_file: Path, *, now: datetime, new_node_key: bool = False) -> JoinRequest:
    """Write ``join-request.json`` beside ``site_file``, from what that file says now; the request.

    Args:
        site_file: the partner's ``site.yaml``.
        now: UTC.
        new_node_key: make a new key for the connection and ask for it to be enrolled; the node changes over to it by
            itself when the coordinator has done so.

    Raises:
        DocumentRefused: settings or keys cannot be read, or a new key waits already.
    """
    site = read_site(site_file)
    key = SigningKey.load(site.path(site.settings.key))
    node_key = site.path(site.settings.link.node_key)
    waiting = next_node_key(node_key)
    if new_node_key:
        if waiting.exists():
            raise DocumentRefused(
                f"node key {waiting}: waits already for the coordinator to enrol it; send it the request again, which "
                "`fedgrade site request` without --new-node-key writes anew"
            )
        create_node_key(waiting)
    # A request that names the old key would take a granted one back.
    asked = waiting if waiting.exists() else node_key
    public = asked.with_name(asked.name + ".pub")
    request = JoinRequest(
        site=site.settings.site,
        key=key.public,
        node_key=read_own_file(public, what="node key").decode(errors="replace").strip(),
        declared_items=site.settings.declared_items,
        made=utc_text(now),
    )
    write_durably(site_file.parent / REQUEST, write_request(request, key))
    return request


def join(site_file: Path, raw: bytes, *, approve: Callable[[PublicKey], None]) -> Joined:
    """Take the coordinator's bundle ``raw``: the roster, its authority and its address are written where they belong.

    Args:
        site_file: the partner's ``site.yaml``; the address in it is replaced, its comments stay.
        raw: the bundle as it came.
        approve: called with the coordinator's key if this site has no coordinator yet; returns if it is the right one.

    Raises:
        DocumentRefused, SignatureRefused: the bundle is malformed, altered, another coordinator's, older than the one
            in force, or does not name this site with exactly its own key. Nothing was changed.
    """
    site, bundle = read_site(site_file), read_bundle(raw)
    before = _held_roster(site)
    if before is None:
        approve(bundle.roster.coordinator)
    elif before.coordinator != bundle.roster.coordinator:
        raise SignatureRefused(
            f"bundle: is signed by {bundle.roster.coordinator.fingerprint}; this site's coordinator is "
            f"{before.coordinator.fingerprint}. A site keeps its coordinator"
        )
    held = _held_bundle(site)
    _require_newer(bundle, raw, held)
    _require_named(site, bundle.roster, before)
    text = with_address(read_own_file(site_file, what="site file").decode(), bundle.address)
    authority = site.path(site.settings.link.root_certificate)
    moved = held is not None and (held[0].address, held[0].authority) != (bundle.address, bundle.authority)
    write_durably(authority, bundle.authority.encode())
    write_durably(site_file, text.encode())
    write_durably(site.path(site.settings.roster), encode(bundle.roster))
    # Last: as long as it is missing, the same bundle is taken again.
    write_durably(site.path(BUNDLE), raw)
    came_back = take_back(site)
    known = before.sites if before else {}
    return Joined(
        bundle=bundle,
        arrived=tuple(sorted(bundle.roster.sites.keys() - known.keys())),
        left=tuple(sorted(known.keys() - bundle.roster.sites.keys())),
        moved=moved,
        came_back=came_back,
    )


def with_address(text: str, address: str) -> str:
    """The site file ``text`` with ``link.address`` set to ``address`` and nothing else changed, comments included.

    Raises:
        DocumentRefused: the file is written in a way in which that line cannot be found.
    """
    before = decode_yaml(SiteSettings, text.encode(), what="site file")
    after = _ADDRESS.sub(lambda found: found[1] + quoted(address), text, count=1)
    wanted = replace(before, link=replace(before.link, address=address))
    # Whatever the pattern hit, the file must now say what it said, and the new address.
    if decode_yaml(SiteSettings, after.encode(), what="site file") != wanted:
        raise DocumentRefused(f"site file: set link.address to {address} by hand; it is not on a line of its own")
    return after


def _held_roster(site: SiteFolder) -> Roster | None:
    path = site.path(site.settings.roster)
    return read_roster(path) if path.exists() else None


def _held_bundle(site: SiteFolder) -> tuple[JoinBundle, bytes] | None:
    path = site.path(BUNDLE)
    if not path.exists():
        return None
    raw = read_own_file(path, what="bundle", limit=MAX_PAPER_BYTES)
    return read_bundle(raw, what=f"bundle {path}"), raw


def _require_newer(bundle: JoinBundle, raw: bytes, held: tuple[JoinBundle, bytes] | None) -> None:
    if held is None:
        return
    standing, known = held
    if bundle.sequence < standing.sequence or (bundle.sequence == standing.sequence and raw != known):
        raise DocumentRefused(
            f"bundle: number {bundle.sequence} of {bundle.issued}; this site has number {standing.sequence} of "
            f"{standing.issued}; ask the coordinator for the newest"
        )


def _require_named(site: SiteFolder, roster: Roster, before: Roster | None) -> None:
    name, own = site.settings.site, SigningKey.load(site.path(site.settings.key)).public
    if name not in roster.sites:
        was = before is not None and name in before.sites
        raise DocumentRefused(
            f"bundle: site {name} is not on its roster; "
            + ("it was revoked" if was else f"send the coordinator {REQUEST}, and join with the bundle made after that")
        )
    if roster.sites[name] != own:
        raise SignatureRefused(
            f"bundle: names {name} with key {roster.sites[name].fingerprint}; this site's own is {own.fingerprint}"
        )


def _check_manifest(path: Path, grades: tuple[str, ...]) -> None:
    free = tuple((0.0,) * len(grades) for _ in grades)
    scale = GradeScale(name="policy", labels=grades, critical=(), cost=free)
    read_manifest(read_own_file(path, what="manifest", limit=MAX_MANIFEST_BYTES), scale)


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    """What was new in ``folder`` is taken away again if the block fails."""
    there = set(folder.iterdir())
    try:
        yield
    except BaseException:
        for path in set(folder.iterdir()) - there:
            path.unlink()
        raise
