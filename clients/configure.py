"""A site put together from a partner's own files: key, policy, photos, ledger. Trusted fully, never sent anywhere."""

import fcntl
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from clients.kept_inputs import KeptInputs
from clients.settings import SiteFolder, read_own_file
from fedgrade.data.assets import FeatureStore
from fedgrade.data.manifest import MAX_MANIFEST_BYTES, Photo, Split
from fedgrade.data.photos import PhotoLimits, open_photo, verify_photos
from fedgrade.errors import CacheUnavailable, DocumentRefused
from fedgrade.federation.approvals import Approvals
from fedgrade.federation.charging import Charging
from fedgrade.federation.holdings import CohortData, SiteData
from fedgrade.federation.house_rules import HouseRules
from fedgrade.federation.outbox import Outbox
from fedgrade.federation.policy import Policy
from fedgrade.federation.site import Site, SiteIdentity
from fedgrade.model.backbones import OnnxExtractor, TorchExtractor, extractor
from fedgrade.model.compute import Compute, torch_device
from fedgrade.model.preprocessing import prepare
from fedgrade.model.spec import ModelSpec, View
from fedgrade.model.views import ViewedExtractor
from fedgrade.trust.canonical import decode_yaml
from fedgrade.trust.identity import SigningKey, read_roster

logger = logging.getLogger(__name__)


def open_site(site: SiteFolder) -> tuple[Site, Charging]:
    """The site, ready to answer, and its ledger, which the caller must close.

    Raises:
        DocumentRefused: a file is unreadable or malformed.
        LedgerUnavailable, LedgerBroken: the ledger is held by another process, or does not verify.
    """
    settings = site.settings
    identity = SiteIdentity(
        site=settings.site, key=SigningKey.load(site.path(settings.key)), roster=read_roster(site.path(settings.roster))
    )
    if identity.roster.key_of(settings.site) != identity.key.public:
        raise DocumentRefused(f"site {settings.site}: the roster names another key; send the coordinator your new one")
    policy_path = site.path(settings.policy)

    def read_policy() -> Policy:
        return decode_yaml(Policy, read_own_file(policy_path, what="policy"), what=f"policy {policy_path}")

    # Once at the start, so that an operator who is there sees at once what is wrong with it, or with the device.
    read_policy()
    logger.info("networks run on %s", torch_device(settings.device))
    _require_photos(site)
    cohorts = {
        name: CohortData(
            manifest=read_own_file(site.path(cohort.manifest), what="manifest", limit=MAX_MANIFEST_BYTES),
            declared_items=cohort.declared_items,
        )
        for name, cohort in settings.cohorts.items()
    }
    data = SiteData(
        lineage=settings.lineage,
        cohorts=cohorts,
        photos_per_item=settings.photos_per_item,
        photos=LocalPhotos(site=site),
    )
    charging = Charging.open(
        site.path(settings.ledger), site=settings.site, key=identity.key, clock=lambda: datetime.now(UTC)
    )
    outbox = Outbox(site.path(settings.outbox))
    members = site.path(settings.ledger + ".members")
    rules = HouseRules(read_policy, approvals=Approvals(site.approvals), local_time=lambda: datetime.now().astimezone())
    return (
        Site(identity=identity, data=data, rules=rules, charging=charging, outbox=outbox, members=members),
        charging,
    )


def _require_photos(site: SiteFolder) -> None:
    photos = site.path(site.settings.photos)
    if not photos.is_dir():
        raise DocumentRefused(
            f"photos {photos}: no such folder; correct `photos` in site.yaml, where `~` stands for nothing: a path is "
            "absolute, or starts from the file's own folder"
        )


@dataclass(frozen=True, kw_only=True)
class LocalPhotos:
    """Photos in a folder, their features in a private cache beside it, what networks see of them in memory."""

    site: SiteFolder
    limits: PhotoLimits = field(default_factory=PhotoLimits)
    kept: KeptInputs = field(default_factory=KeptInputs)

    def prepare(self, model: ModelSpec, photos: Sequence[Photo]) -> None:
        """Check every photo, and cache the features of those that are new, in every view that training looks at."""
        verify_photos(photos, self.site.path(self.site.settings.photos), self.limits)
        training = [photo for photo in photos if photo.split is Split.TRAIN]
        upright, *turned = model.views
        self._store(model, upright).forget_others(photos)
        self.kept.forget_others(photo.digest for photo in photos)
        self.features(model, photos, upright)
        for view in turned if model.on_features else ():
            self.features(model, training, view)

    @property
    def compute(self) -> Compute:
        """What the partner gives to networks."""
        return Compute(device=self.site.settings.device, threads=self.site.settings.threads)

    def features(self, model: ModelSpec, photos: Sequence[Photo], view: View) -> npt.NDArray[np.float32]:
        """Features [photos, dimensions] as ``view`` shows the photos; extracted where the cache has none."""
        return self._store(model, view).features(photos, progress=_log_progress)

    def _store(self, model: ModelSpec, view: View) -> FeatureStore:
        settings = self.site.settings
        folder = self.site.path(settings.cache)
        _make(folder, mode=0o700)
        frozen = _extractor(model.frozen, self.site.path(settings.backbones), self.compute)
        return FeatureStore(
            root=self.site.path(settings.photos),
            cache=folder,
            extractor=ViewedExtractor(extractor=frozen, view=view),
            limits=self.limits,
        )

    def inputs(self, model: ModelSpec, photos: Sequence[Photo]) -> npt.NDArray[np.float32]:
        """Network inputs [photos, 3, input, input] of upright photos, read from the disk unless they are still kept."""
        root, size = self.site.path(self.site.settings.photos), model.input_size

        def prepared(photo: Photo) -> npt.NDArray[np.float32]:
            return prepare(open_photo(root, photo, self.limits), size)

        return np.stack([self.kept.input(photo.digest, size, partial(prepared, photo)) for photo in photos])


@cache
def _extractor(model: ModelSpec, folder: Path, compute: Compute) -> OnnxExtractor | TorchExtractor:
    """One extractor a model and process; sites that share ``folder`` wait for the first to export into it."""
    _make(folder)
    with _opened_for_lock(folder / "export.lock") as lock:
        # torch's exporter is neither quick nor safe in two threads at once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The cache keeps features of a GPU, in mixed precision, apart from those of a CPU: by the extractor's digest.
        found = extractor(model, cache=folder, device=compute.device, threads=compute.threads, on_gpu="float16")
    logger.info("features by %s: %s; cached under %s", model.backbone, found.described, found.digest[:16])
    return found


def _make(folder: Path, *, mode: int = 0o777) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise CacheUnavailable(f"{folder}: cannot be made ({error.strerror}); free space or choose another") from error


def _opened_for_lock(path: Path) -> IO[bytes]:
    try:
        return path.open("wb")
    except OSError as error:
        raise CacheUnavailable(f"{path}: cannot be opened ({error.strerror}); free space or choose another") from error


def _log_progress(done: int, total: int) -> None:
    # A share, not a count: logs travel further than one means them to.
    logger.info("features: %d %%", 100 * done // max(1, total))
