"""The manifest: one CSV row per photo, and the rules that keep a partner's data honest.

Columns are the fields of :class:`Photo`. The reader refuses whatever would weaken a guarantee further up: the same
bytes twice would be one item counted twice against its privacy bound; one physical source on both sides of the split
would make every reported quality too good; a path that leaves the folder would read a stranger's file.
"""

import csv
import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import PurePosixPath
from typing import TypeVar

from fedgrade.errors import DataRefused
from fedgrade.grading import GradeScale

MAX_MANIFEST_BYTES = 128 * 2**20
MAX_PHOTOS = 250_000
MAX_TEXT = 500  # characters of one field
SYNTHETIC_CEILING = 0.1

Choice = TypeVar("Choice", bound=StrEnum)

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Split(StrEnum):
    """Which side of the training a photo is on, for the life of the data."""

    TRAIN = "train"
    TEST = "test"


class Provenance(StrEnum):
    """Whether a camera or a generator made the photo."""

    REAL = "real"
    SYNTHETIC = "synthetic"


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo, as its manifest row describes it.

    Attributes:
        path: where it lies, relative to the partner's photo folder, with forward slashes.
        digest: SHA-256 of the file, in hexadecimal.
        item: the inspected item it shows; all photos of an item share one privacy bound.
        source: the physical thing photographed, of which an item may be a part (a cell's module).
        grade: a label of the grade scale.
        split: training or test.
        provenance: real or synthetic.
        licence: on what terms it may be used.
        origin: where it came from, in words.
    """

    path: str
    digest: str
    item: str
    source: str
    grade: str
    split: Split
    provenance: Provenance
    licence: str
    origin: str

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_text(field.name, getattr(self, field.name))
        _check_path(self.path)
        if not _DIGEST.fullmatch(self.digest):
            raise DataRefused(f"digest {self.digest!r} is not 64 lower-case hexadecimal digits")
        if self.provenance is Provenance.SYNTHETIC and self.split is Split.TEST:
            raise DataRefused(f"{self.path!r} is synthetic and in the test split; quality is measured on real photos")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One inspected item with all its photos: the unit of privacy. ``grade`` is its position on the scale."""

    name: str
    grade: int
    split: Split
    photos: tuple[Photo, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All photos of one partner, checked against each other and against ``scale``.

    ``digest`` is the SHA-256 of the file this was read from, in hexadecimal.
    """

    photos: tuple[Photo, ...]
    digest: str
    scale: GradeScale

    def items(self, split: Split) -> tuple[Item, ...]:
        """The items of ``split``, sorted by name; an item's photos keep the manifest's order."""
        by_name: dict[str, list[Photo]] = {}
        for photo in self.photos:
            if photo.split is split:
                by_name.setdefault(photo.item, []).append(photo)
        return tuple(
            Item(name=name, grade=self.scale.index(photos[0].grade), split=split, photos=tuple(photos))
            for name, photos in sorted(by_name.items())
        )


def read_manifest(raw: bytes, scale: GradeScale, *, synthetic_ceiling: float = SYNTHETIC_CEILING) -> Manifest:
    """The manifest that the CSV bytes ``raw`` spell out.

    Args:
        raw: UTF-8 CSV with a header row; the columns are the fields of :class:`Photo`, in any order.
        scale: the grades that a row may name.
        synthetic_ceiling: largest share of the training photos that may be synthetic.

    Raises:
        DataRefused: not such a file; the message names the first row at fault (the header is row 1) and its value.
    """
    photos = tuple(_read_rows(raw))
    _check_together(photos, scale)
    _check_synthetic_share(photos, synthetic_ceiling)
    return Manifest(photos=photos, digest=hashlib.sha256(raw).hexdigest(), scale=scale)


def write_manifest(photos: Sequence[Photo]) -> bytes:
    """``photos`` as manifest bytes: ``read_manifest(write_manifest(photos), scale).photos == photos``."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(photo, column) for column in COLUMNS] for photo in photos)
    return text.getvalue().encode()


COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(Photo))


def _read_rows(raw: bytes) -> Iterable[Photo]:
    if len(raw) > MAX_MANIFEST_BYTES:
        raise DataRefused(f"manifest: {len(raw)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    try:
        # Spreadsheets put a byte order mark in front; it is no part of the first column's name.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataRefused(f"manifest: byte {error.start} is not UTF-8; save it as CSV UTF-8") from error
    number = 0
    try:
        for number, cells in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True), start=1):
            if number == 1:
                columns = _header(cells)
            else:
                yield _read_row(columns, cells, number)
    except csv.Error as error:
        raise DataRefused(f"manifest row {number + 1}: not CSV: {error}") from error
    if number <= 1:
        raise DataRefused("manifest: names no photo")


def _header(cells: list[str]) -> list[str]:
    for column in cells:
        if column not in COLUMNS or cells.count(column) > 1:
            raise DataRefused(f"manifest row 1: column {column[:80]!r} is unknown or twice; columns are {COLUMNS}")
    missing = [column for column in COLUMNS if column not in cells]
    if missing:
        raise DataRefused(f"manifest row 1: column {missing[0]!r} is missing")
    return cells


def _read_row(columns: list[str], cells: list[str], number: int) -> Photo:
    if number - 1 > MAX_PHOTOS:
        raise DataRefused(f"manifest row {number}: the limit is {MAX_PHOTOS} photos")
    if len(cells) != len(columns):
        raise DataRefused(f"manifest row {number}: {len(cells)} fields where the header has {len(columns)}")
    row = dict(zip(columns, cells, strict=True))
    try:
        return Photo(
            path=row["path"],
            digest=row["digest"],
            item=row["item"],
            source=row["source"],
            grade=row["grade"],
            split=_one_of(Split, row["split"]),
            provenance=_one_of(Provenance, row["provenance"]),
            licence=row["licence"],
            origin=row["origin"],
        )
    except DataRefused as error:
        raise DataRefused(f"manifest row {number}: {error}") from error


def _one_of(choices: type[Choice], text: str) -> Choice:
    if text not in list(choices):
        raise DataRefused(f"{choices.__name__.lower()} {text[:80]!r} is not one of {[str(each) for each in choices]}")
    return choices(text)


def _check_text(name: str, text: str) -> None:
    # Not printable covers NUL, line breaks and the marks that make a name read otherwise than it sorts.
    if not text or text != text.strip() or not text.isprintable() or len(text) > MAX_TEXT:
        raise DataRefused(
            f"{name} {text[:80]!r} is empty, padded with spaces, longer than {MAX_TEXT} or holds control characters"
        )
    if not unicodedata.is_normalized("NFC", text):
        raise DataRefused(f"{name} {text[:80]!r} is not in Unicode form NFC, so equal names could differ")


def _check_path(path: str) -> None:
    plain = PurePosixPath(path)
    if "\\" in path or plain.is_absolute() or ".." in plain.parts or str(plain) != path or path == ".":
        raise DataRefused(f"path {path[:80]!r} must be plain and relative to the photo folder, without '..' or '\\'")


def _check_together(photos: Sequence[Photo], scale: GradeScale) -> None:
    """Refuse what no row shows alone: repetitions and contradictions."""
    paths: set[str] = set()
    digests: set[str] = set()
    by_item: dict[str, Photo] = {}
    side: dict[str, Split] = {}
    for number, photo in enumerate(photos, start=2):
        first = by_item.setdefault(photo.item, photo)
        if photo.grade not in scale.labels:
            _refuse(number, f"grade {photo.grade!r} is not one of {list(scale.labels)}")
        if photo.path in paths:
            _refuse(number, f"path {photo.path!r} is named twice")
        if photo.digest in digests:
            _refuse(number, f"digest {photo.digest} of {photo.path!r} is there already: the same photo, counted twice")
        for name in ("grade", "split", "source"):
            here, before = str(getattr(photo, name)), str(getattr(first, name))
            if here != before:
                _refuse(number, f"item {photo.item!r} has {name} {here!r} and {before!r}")
        if side.setdefault(photo.source, photo.split) is not photo.split:
            _refuse(number, f"source {photo.source!r} is in both splits; split by source, never by photo")
        paths.add(photo.path)
        digests.add(photo.digest)


def _check_synthetic_share(photos: Sequence[Photo], ceiling: float) -> None:
    training = [photo for photo in photos if photo.split is Split.TRAIN]
    synthetic = sum(photo.provenance is Provenance.SYNTHETIC for photo in training)
    if synthetic > ceiling * len(training):
        share = synthetic / len(training)
        raise DataRefused(f"manifest: {share:.1%} of the training photos are synthetic; the ceiling is {ceiling:.1%}")


def _refuse(number: int, why: str) -> None:
    raise DataRefused(f"manifest row {number}: {why}")
