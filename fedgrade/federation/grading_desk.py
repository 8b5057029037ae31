"""Grading photos with a released model, after the release has been verified and not before."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from fedgrade.data.manifest import Photo, Provenance, Split
from fedgrade.data.photos import PhotoLimits, digest_file, open_photo
from fedgrade.errors import DataRefused
from fedgrade.federation.release import open_release
from fedgrade.grading import decide, expected_costs
from fedgrade.model.backbones import extractor
from fedgrade.model.head import grade_probabilities, head_inputs
from fedgrade.trust.identity import Roster

_NEUTRAL = "photo"


@dataclass(frozen=True, kw_only=True)
class GradedPhoto:
    """A photo's grade: the cheapest to be wrong about, how probable it is, and what the decision costs on average.

    The expected cost is in the units of the job's cost matrix.
    """

    photo: Path
    grade: str
    confidence: float
    expected_cost: float
    critical: bool


def grade_photos(photos: Sequence[Path], *, release: Path, roster: Roster, cache: Path) -> list[GradedPhoto]:
    """Each of ``photos``, graded as an item of its own by the model in the folder ``release``.

    Raises:
        SignatureRefused, DocumentRefused, ModelRefused: the release is not one by the roster's coordinator.
        DataRefused: a photo cannot be read.
    """
    opened = open_release(release, signed_by=roster.coordinator)
    scale = opened.release.job.spec.grading
    cache.mkdir(parents=True, exist_ok=True)
    backbone = extractor(opened.release.job.spec.model, cache=cache, device="auto", threads=1)
    graded = []
    for path in photos:
        image = _pixels(path)
        features = backbone.extract(backbone.prepare(image)[None])
        inputs = head_inputs(features.astype(np.float64), opened.head.centre)
        probabilities = grade_probabilities(opened.head.thresholds, inputs)
        decided = int(decide(probabilities, scale)[0])
        graded.append(
            GradedPhoto(
                photo=path,
                grade=scale.labels[decided],
                confidence=float(probabilities[0, decided]),
                expected_cost=float(expected_costs(probabilities, scale)[0, decided]),
                critical=decided in scale.critical_indices,
            )
        )
    return graded


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    """The pixels of the file at ``path``, under whatever name its owner gave it.

    A manifest refuses names with spaces at their ends or control characters, so a copy of a neutral name is opened.

    Raises:
        DataRefused: it cannot be read, or is no photo.
    """
    if path.exists() and not path.is_file():
        raise DataRefused(f"photo {path}: not a plain file")
    limit = PhotoLimits()
    if path.exists() and path.stat().st_size > limit.max_bytes:
        raise DataRefused(f"photo {path}: {path.stat().st_size} bytes; the limit is {limit.max_bytes}")
    try:
        with TemporaryDirectory() as folder:
            shutil.copyfile(path, Path(folder) / _NEUTRAL)
            return open_photo(Path(folder), _on_its_own(Path(folder) / _NEUTRAL), limit)
    except OSError as error:
        raise DataRefused(f"photo {path}: cannot be read ({error.strerror})") from error
    except DataRefused as error:
        raise DataRefused(str(error).replace(repr(_NEUTRAL), str(path))) from error


def _on_its_own(path: Path) -> Photo:
    """A photo that no manifest describes: the file itself is what is wanted, so its digest is whatever it is."""
    found = digest_file(path)
    return Photo(
        path=path.name,
        digest=found,
        item=found,
        source=found,
        grade="not yet known",
        split=Split.TEST,
        provenance=Provenance.REAL,
        licence="the owner's",
        origin="the command line",
    )
