"""A published model: weights, the sealed job they come from, what it cost, how good it is, and a signature over all.

Partners open a release before they use it; whoever does gets a verified value or an error, never a boolean.
"""

from dataclasses import dataclass
from pathlib import Path

from fedgrade.errors import DocumentRefused, ModelRefused, SignatureRefused
from fedgrade.evaluation import ConfusionCounts, GradingMetrics
from fedgrade.federation.payloads import Head, read_head, write_head
from fedgrade.federation.store import Documents
from fedgrade.job import TrainingJob
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import PublicKey, SigningKey, SiteId

DOCUMENT, WEIGHTS = "release.json", "weights.safetensors"
MAX_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class ModelRelease:
    """What the coordinator signs when it publishes.

    ``counts`` and ``metrics`` were measured on held-out real photos under differential privacy; ``contributions`` is
    how many stages each site answered.
    """

    job: TrainingJob
    weights_digest: str
    counts: ConfusionCounts
    metrics: GradingMetrics
    contributions: dict[SiteId, int]
    published: str


@dataclass(frozen=True, kw_only=True)
class OpenedRelease:
    """A release that was verified, and its head."""

    release: ModelRelease
    head: Head
    digest: str


def publish(release: ModelRelease, head: Head, *, to: Documents, key: SigningKey) -> str:
    """Write ``release`` and its weights ``to`` a place; returns the digest of the signed document."""
    weights = write_head(head)
    if digest(weights) != release.weights_digest:
        raise ModelRefused("release: the weights are not those that the document names")
    document = seal(release, key)
    to.write({WEIGHTS: weights, DOCUMENT: document})
    return digest(document)


def standing_release(place: Documents, *, signed_by: PublicKey) -> OpenedRelease | None:
    """The release that :func:`publish` wrote to ``place``; None where it wrote none, or only a part.

    Raises:
        DocumentRefused, SignatureRefused, ModelRefused: what is there is not such a release.
    """
    document, weights = place.read(DOCUMENT, limit=MAX_BYTES), place.read(WEIGHTS, limit=MAX_BYTES)
    if document is None or weights is None:
        return None
    return opened_from(document, weights, signed_by=signed_by, what=f"release {place.where(DOCUMENT)}")


def open_release(folder: Path, *, signed_by: PublicKey) -> OpenedRelease:
    """The release in ``folder``, signed by ``signed_by``, with weights that are the ones it names.

    Raises:
        DocumentRefused, SignatureRefused, ModelRefused: it is not such a release; nothing of it may be used.
    """
    document, weights = _read(folder / DOCUMENT), _read(folder / WEIGHTS)
    return opened_from(document, weights, signed_by=signed_by, what=f"release {folder}")


def opened_from(document: bytes, weights: bytes, *, signed_by: PublicKey, what: str) -> OpenedRelease:
    """The release of the sealed ``document``, signed by ``signed_by``, with its ``weights``; ``what`` is its name.

    Raises:
        DocumentRefused, SignatureRefused, ModelRefused: it is not such a release; nothing of it may be used.
    """
    try:
        release = open_sealed(document, as_=ModelRelease, signed_by=signed_by, what=what)
    except SignatureRefused as error:
        raise SignatureRefused(f"{what}: {error}") from error
    if digest(weights) != release.weights_digest:
        raise ModelRefused(f"{what}: {WEIGHTS} is not the file that was signed for")
    return OpenedRelease(release=release, head=read_head(weights, release.job), digest=digest(document))


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DocumentRefused(f"release {path}: {path.stat().st_size} bytes; the limit is {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise DocumentRefused(f"release {path}: cannot be read ({error.strerror})") from error
