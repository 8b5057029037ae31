"""Grading photos with a released model, after the release has been verified and not before."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from fedgrade.data.manifest import Photo, Provenance, Split
from fedgrade.data.photos import PhotoLimits, digest_file, open_photo
from fedgrade.errors import DataRefused
from fedgrade.federation.bundle import open_model
from fedgrade.federation.payloads import Head
from fedgrade.grading import decide, expected_costs
from fedgrade.model.adapter import graded_inputs
from fedgrade.model.backbones import extractor
from fedgrade.model.compute import Compute, Device
from fedgrade.model.head import grade_probabilities
from fedgrade.model.preprocessing import FeatureArray, prepare
from fedgrade.model.spec import ModelSpec
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
    """Each of ``photos``, graded as an item of its own by the model in the folder ``release``, or bundle.

    Raises:
        SignatureRefused, DocumentRefused, ModelRefused: the release is not one by the roster's coordinator.
        DataRefused: a photo cannot be read.
    """
    opened = open_model(release, signed_by=roster.coordinator)
    scale, model = opened.release.job.spec.grading, opened.release.job.spec.model
    grade = grader(model, opened.head, cache=cache, device="auto")
    graded = []
    for path in photos:
        probabilities = grade(prepare(_pixels(path), model.input_size)[None])
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


def grader(
    model: ModelSpec, head: Head, *, cache: Path, device: Device
) -> Callable[[FeatureArray], npt.NDArray[np.float64]]:
    """What turns network inputs [photos, 3, input, input] into probabilities [photos, grades] by ``head``."""
    cache.mkdir(parents=True, exist_ok=True)
    extract = _extract(model, head, cache=cache, device=device)

    def probabilities(batch: FeatureArray) -> npt.NDArray[np.float64]:
        inputs = graded_inputs(model, extract(batch), centre=head.centre, change=head.network)
        return grade_probabilities(head.thresholds, inputs)

    return probabilities


def _extract(model: ModelSpec, head: Head, *, cache: Path, device: Device) -> Callable[[FeatureArray], FeatureArray]:
    """What turns network inputs [photos, 3, input, input] into features: frozen backbone or trained network."""
    if model.on_features:
        return extractor(model, cache=cache, device=device, threads=1).extract
    # Torch takes seconds to start; a head on a frozen backbone never needs it.
    from fedgrade.model.networks import TrainedExtractor  # noqa: PLC0415

    return TrainedExtractor(model, head.network, compute=Compute(device=device, threads=1)).extract


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
