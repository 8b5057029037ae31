"""``site.yaml``: what a partner writes down about its own node. Read strictly; needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from clients.link import NodeLink
from fedgrade.errors import DocumentRefused
from fedgrade.model.compute import DEVICE
from fedgrade.trust.canonical import decode_yaml
from fedgrade.trust.identity import SiteId, site_id

MAX_COHORTS = 1000


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """Where the coordinator is: its public ``host:port``, the authority that vouches for it, this node's own key."""

    address: str
    root_certificate: str
    node_key: str


@dataclass(frozen=True, kw_only=True)
class CohortSettings:
    """One batch of items: its manifest (CSV, one row a photo), and the number of training items to publish for it."""

    manifest: str
    declared_items: int

    def __post_init__(self) -> None:
        if self.declared_items < 1:
            raise DocumentRefused(f"site.cohorts: declared_items {self.declared_items} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """``site.yaml``, field by field. Paths are relative to the file's own folder.

    Attributes:
        site: this partner's name on the roster.
        key: Ed25519 private key (PEM, mode 0600).
        roster: who is who; obtained from the coordinator and compared out of band.
        policy: this partner's own ceilings.
        photos: folder that the manifests' paths start from.
        lineage: names the data set; budgets hang on it for life.
        cohorts: the batches in which the items came in, by name, each with budgets of its own; items keep theirs.
        photos_per_item: the most photos that one item may have.
        ledger: the append-only file; never delete it.
        outbox: sent replies, so that a question asked twice gets the same bytes.
        cache: extracted features; as sensitive as the photos.
        backbones: exported public backbones; sites on one machine may share the folder.
        threads: of one extraction.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` takes the first GPU where there is one.
        socket: for ``fedgrade site status`` and its kin.
        link: how the coordinator is reached.
    """

    site: SiteId
    key: str
    roster: str
    policy: str
    photos: str
    lineage: str
    cohorts: dict[str, CohortSettings]
    photos_per_item: int
    ledger: str
    outbox: str
    cache: str
    backbones: str
    threads: int
    device: str
    socket: str
    link: LinkSettings

    def __post_init__(self) -> None:
        site_id(self.site)
        if not DEVICE.fullmatch(self.device):
            raise DocumentRefused(f"site.device: {self.device[:40]!r} is none; auto, cpu, cuda or cuda:N is expected")
        if self.photos_per_item < 1:
            raise DocumentRefused(f"site.photos_per_item: {self.photos_per_item} must be at least 1")
        if not 1 <= len(self.cohorts) <= MAX_COHORTS:
            raise DocumentRefused(f"site.cohorts: {len(self.cohorts)}; a site has 1 to {MAX_COHORTS}")

    @property
    def declared_items(self) -> int:
        """What the partner publishes of its size, all cohorts together."""
        return sum(cohort.declared_items for cohort in self.cohorts.values())


@dataclass(frozen=True, kw_only=True)
class SiteFolder:
    """Settings, and the folder their paths start from."""

    settings: SiteSettings
    folder: Path

    def path(self, name: str) -> Path:
        """``name`` from this folder; an absolute path stays what it is."""
        return self.folder / name

    @property
    def socket(self) -> Path:
        """Where the running site listens for its operator."""
        return self.path(self.settings.socket)

    @property
    def approvals(self) -> Path:
        """Where the jobs are that a person was asked about."""
        return self.path(self.settings.ledger + ".approvals")

    @property
    def link(self) -> NodeLink:
        """How the node reaches the coordinator.

        Raises:
            DocumentRefused: the site has not joined one yet.
        """
        link = self.settings.link
        if not link.address:
            raise DocumentRefused(
                f"site {self.settings.site}: has no coordinator yet; take its bundle with `fedgrade site join`"
            )
        return NodeLink(
            address=link.address,
            root_certificate=self.path(link.root_certificate),
            node_key=self.path(link.node_key),
        )


def read_site(path: Path) -> SiteFolder:
    """The settings in the YAML file ``path``.

    Raises:
        DocumentRefused: unreadable, or a key is unknown, missing or mistyped.
    """
    settings = decode_yaml(SiteSettings, read_own_file(path, what="site file"), what=f"site file {path}")
    return SiteFolder(settings=settings, folder=path.resolve().parent)


def read_own_file(path: Path, *, what: str, limit: int = 2**20) -> bytes:
    """The bytes of one of the partner's own files, at most ``limit`` of them.

    Raises:
        DocumentRefused: unreadable or too large.
    """
    try:
        if path.stat().st_size > limit:
            raise DocumentRefused(f"{what} {path}: {path.stat().st_size} bytes; the limit is {limit}")
        return path.read_bytes()
    except OSError as error:
        raise DocumentRefused(f"{what} {path}: cannot be read ({error.strerror})") from error
