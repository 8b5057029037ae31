"""A whole federation's files on one machine: a coordinator and five recyclers with real photos, each with its own keys.

For the demo, for trials and for tests. Every file is the one a real partner would have, written where that partner
would keep it; the folder must lie outside version control. Only the demo's photos (elpv-dataset) are known here.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from clients.joining import with_address
from clients.settings import read_site
from clients.templates import PolicyValues, SiteValues, policy_yaml, site_yaml
from fedgrade.data import elpv
from fedgrade.data.manifest import Split, read_manifest
from fedgrade.errors import DocumentRefused
from fedgrade.federation.in_process import Answer
from fedgrade.grading import GradeScale
from fedgrade.job import DataSpec, JobSpec
from fedgrade.trust.canonical import encode
from fedgrade.trust.identity import Roster, SigningKey, SiteId, site_id
from server.certificates import create_node_key
from server.coordinator_folder import CoordinatorFolder

# What partners publish is rounded: it need not be exact, and what is not exact says less. It is no privacy by itself.
DECLARED_STEP = 50


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The policy that every recycler of a local federation starts with; each may edit its own copy afterwards."""

    modes: tuple[str, ...]
    epsilon_limit: float
    epsilon_per_job: float
    backbones: tuple[str, ...] = ("tf_efficientnet_lite0",)

    @classmethod
    def for_job(cls, spec: JobSpec, *, epsilon_limit: float) -> Self:
        """Terms on which a job like ``spec`` may spend all that there is."""
        return cls(
            modes=(spec.privacy.mode,),
            epsilon_limit=epsilon_limit,
            epsilon_per_job=epsilon_limit,
            backbones=tuple(dict.fromkeys(("tf_efficientnet_lite0", spec.model.backbone))),
        )


@dataclass(frozen=True, kw_only=True)
class LocalFederation:
    """Paths of a federation on this machine."""

    root: Path

    @property
    def coordinator(self) -> CoordinatorFolder:
        """The coordinator's part."""
        return CoordinatorFolder(root=self.root)

    @property
    def exists(self) -> bool:
        """Whether it was set up."""
        return self.coordinator.roster.exists()

    def site_file(self, site: SiteId) -> Path:
        """``site.yaml`` of one recycler."""
        return self.root / "sites" / site / "site.yaml"

    def node_key(self, site: SiteId) -> Path:
        """The public transport key that the coordinator registers."""
        return self.root / "sites" / site / "node_key.pub"

    def sites(self) -> tuple[SiteId, ...]:
        """Everyone on the roster."""
        return tuple(sorted(self.coordinator.read_roster().sites))

    def declared_items(self) -> dict[SiteId, int]:
        """What each recycler published about its size."""
        return {site: read_site(self.site_file(site)).settings.declared_items for site in self.sites()}

    def connect(self, address: str, authority: Path) -> None:
        """Tell every site where the coordinator listens now; ports on loopback differ from start to start."""
        for site in self.sites():
            path = self.site_file(site)
            path.write_text(with_address(path.read_text(), address))
            own = read_site(path)
            own.path(own.settings.link.root_certificate).write_bytes(authority.read_bytes())

    @contextmanager
    def answers(self) -> Iterator[dict[SiteId, Answer]]:
        """Every site opened in this process, for a simulation or an in-process run; ledgers are held meanwhile."""
        # Imported here: it brings torch in, which a deployment's own process has no use for.
        from clients.configure import open_site  # noqa: PLC0415

        with ExitStack() as stack:
            answers: dict[SiteId, Answer] = {}
            for site in self.sites():
                partner, charging = open_site(read_site(self.site_file(site)))
                stack.enter_context(charging)
                answers[site] = partner.answer
            yield answers


def create_local_federation(
    root: Path, *, scale: GradeScale, data: DataSpec, terms: Terms, cache: Path
) -> LocalFederation:
    """A new federation in the folder ``root``, which must not hold one yet. ``cache`` keeps features across folders.

    Raises:
        DocumentRefused: there is one already; its keys and ledgers are never overwritten.
        DataRefused: the demo's photos are not installed.
    """
    federation = LocalFederation(root=root)
    if federation.exists:
        raise DocumentRefused(f"{root}: holds a federation already; its keys and ledgers are never overwritten")
    manifests = elpv.site_manifests(scale, test_fraction=data.test_fraction)
    keys = {site_id(name): SigningKey.generate() for name in manifests}
    (root / "coordinator").mkdir(parents=True, exist_ok=True, mode=0o700)
    coordinator = SigningKey.generate()
    coordinator.save(federation.coordinator.key)
    for site, key in keys.items():
        _create_site(federation, site, key=key, manifest=manifests[site], scale=scale, terms=terms, cache=cache)
    roster = Roster(coordinator=coordinator.public, sites={site: key.public for site, key in keys.items()})
    # Written last: a folder with a roster is whole.
    federation.coordinator.roster.write_bytes(encode(roster))
    return federation


def declared_size(manifest: bytes, scale: GradeScale) -> int:
    """What a recycler of a local federation publishes of the number of its training items."""
    items = len(read_manifest(manifest, scale).items(Split.TRAIN))
    return max(DECLARED_STEP, round(items / DECLARED_STEP) * DECLARED_STEP)


def _create_site(
    federation: LocalFederation,
    site: SiteId,
    *,
    key: SigningKey,
    manifest: bytes,
    scale: GradeScale,
    terms: Terms,
    cache: Path,
) -> None:
    folder = federation.site_file(site).parent
    folder.mkdir(parents=True, mode=0o700)
    key.save(folder / "key.pem")
    create_node_key(folder / "node_key")
    (folder / "manifest.csv").write_bytes(manifest)
    (folder / "policy.yaml").write_text(
        policy_yaml(
            PolicyValues(
                modes=terms.modes,
                epsilon_limit=terms.epsilon_limit,
                epsilon_per_job=terms.epsilon_per_job,
                backbones=terms.backbones,
                grades=scale.labels,
            )
        )
    )
    written = site_yaml(
        SiteValues(
            site=site,
            photos=str(elpv.package_photos()),
            lineage=f"elpv-{site}",
            cohort="2018",
            manifest="manifest.csv",
            declared_items=declared_size(manifest, scale),
            photos_per_item=1,
            threads=max(1, (os.cpu_count() or 1) // 2),
            cache=str(cache.resolve() / site),
            backbones=str(cache.resolve() / "backbones"),
            # One machine, one roster.
            roster="../../roster.json",
            address="127.0.0.1:0",
        )
    )
    federation.site_file(site).write_text(written)
