"""The demo's real data: 2,624 photos of solar cells, graded by experts, as five recyclers who would not share them.

The photos come with the package ``elpv-dataset`` and are read where it installed them; nothing is downloaded or copied.
What the package does not say is restated here as facts: which of the 44 modules each cell was cut from, and in which of
ten runs of one cell type the module was photographed. Modules 30 and 31 are tied: the place of the border between
them is uncertain by about ten cells.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedgrade.data.manifest import Photo, Provenance, Split, write_manifest
from fedgrade.data.photos import digest_file
from fedgrade.data.splits import assign_splits, keyed_order
from fedgrade.errors import DataRefused
from fedgrade.grading import GradeScale

PACKAGE = "elpv_dataset"
ORIGIN = "PyPI elpv-dataset 1.0.0.post1"
LICENCE = "CC BY-NC-SA 4.0"
CITATION = """\
Buerhop-Lutz, C.; Deitsch, S.; Maier, A.; Gallwitz, F.; Berger, S.; Doll, B.; Hauch, J.; Camus, C. & Brabec, C. J. \
A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence Imagery. European PV Solar \
Energy Conference and Exhibition (EU PVSEC), 2018. DOI: 10.4229/35thEUPVSEC20182018-5CV.3.15

Deitsch, S., Buerhop-Lutz, C., Sovetkin, E., Steland, A., Maier, A., Gallwitz, F., & Riess, C. (2021). \
Segmentation of photovoltaic module cells in uncalibrated electroluminescence images. Machine Vision and \
Applications, 32(4). DOI: 10.1007/s00138-021-01191-9

Deitsch, S.; Christlein, V.; Berger, S.; Buerhop-Lutz, C.; Maier, A.; Gallwitz, F. & Riess, C. Automatic \
classification of defective photovoltaic module cells in electroluminescence images. Solar Energy, Elsevier BV, \
2019, 185, 455-468. DOI: 10.1016/j.solener.2019.02.067
"""

PHOTOS = 2624
# Index of each module's first photo; modules have 6x10, 6x12, 4x12, 6x9 or 5x10 cells.
MODULE_STARTS: tuple[int, ...] = (
    *range(0, 1201, 60),
    *range(1254, 1795, 60),
    *range(1844, 2145, 60),
    *range(2216, 2397, 60),
    *range(2444, 2565, 60),
)
# First module, counted from 0, of each run of one cell type.
RUN_STARTS: tuple[int, ...] = (0, 1, 6, 9, 15, 27, 36, 37, 40, 41)
TIED_MODULES = frozenset({"module-30", "module-31"})
RECYCLERS: dict[str, tuple[str, ...]] = {
    "recycler-a": ("run-01", "run-03", "run-07", "run-09"),
    "recycler-b": ("run-02", "run-10"),
    "recycler-c": ("run-04", "run-08"),
    "recycler-d": ("run-05",),
    "recycler-e": ("run-06",),
}
# The package writes the probability of a defect in thirds; the text is matched, so that no rounding decides a grade.
GRADE_OF_PROBABILITY = {"0.0": 0, "0.3333333333333333": 1, "0.6666666666666666": 2, "1.0": 3}

# Public, because the data is: anyone can draw the same split. A partner's own key is secret.
SPLIT_KEY = b"fedgrade elpv demo split 1"
FOLD_KEY = b"fedgrade elpv benchmark folds 1"
TEST_FRACTION = 0.25
MIN_FOLDS = 2
MAX_FOLDS = 18
MAX_LABELS_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One photo of one solar cell; ``grade`` from 0 (surely sound) to 3 (surely defective)."""

    name: str
    module: str
    run: str
    cell_type: str
    grade: int


def package_photos() -> Path:
    """The folder of the installed package's photos, found without running the package's code.

    Raises:
        DataRefused: the package is not installed here.
    """
    package = find_spec(PACKAGE)
    if package is None or package.origin is None or not (root := Path(package.origin).parent / "data/images").is_dir():
        raise DataRefused("the demo's photos are not installed; run: pip install elpv-dataset==1.0.0.post1")
    return root


def cells() -> tuple[Cell, ...]:
    """All cells in the package's order, which is that of the modules.

    Raises:
        DataRefused: the package is missing or its labels are not those of version 1.0.0.post1.
    """
    labels = package_photos().parent / "labels.csv"
    if labels.stat().st_size > MAX_LABELS_BYTES:
        raise DataRefused(f"{labels.name}: {labels.stat().st_size} bytes; the limit is {MAX_LABELS_BYTES}")
    return read_labels(labels.read_bytes())


def read_labels(raw: bytes) -> tuple[Cell, ...]:
    """The cells that the package's ``labels.csv`` names: ``images/cellNNNN.png  probability  type`` on each line.

    Raises:
        DataRefused: a line is not that, or its cell type is not the one of its run.
    """
    try:
        rows = [line.split() for line in raw.decode("ascii").splitlines()]
    except UnicodeDecodeError as error:
        raise DataRefused(f"labels.csv: byte {error.start} is not ASCII") from error
    if len(rows) != PHOTOS:
        raise DataRefused(f"labels.csv: {len(rows)} lines; the 1.0.0.post1 package has {PHOTOS}")
    return tuple(_cell(index, row) for index, row in enumerate(rows))


def site_manifests(
    scale: GradeScale, *, split_key: bytes = SPLIT_KEY, test_fraction: float = TEST_FRACTION
) -> dict[str, bytes]:
    """A manifest for each recycler, paths relative to :func:`package_photos`, split by module.

    Args:
        scale: four grades, from sound to defective.
        split_key: deals the modules of each recycler to training and test.
        test_fraction: share of each recycler's modules to test on.

    Raises:
        DataRefused: the package is missing or changed, or the scale has not four grades.
    """
    if scale.grades != len(GRADE_OF_PROBABILITY):
        raise DataRefused(f"grade scale {scale.name!r}: {scale.grades} grades; the demo's photos have 4")
    root = package_photos()
    by_site = {site: [cell for cell in cells() if cell.run in runs] for site, runs in RECYCLERS.items()}
    manifests = {}
    for site, held in by_site.items():
        modules = {cell.module for cell in held}
        sides = assign_splits(modules, key=split_key, test_fraction=test_fraction, tied=_tied(modules))
        manifests[site] = write_manifest([_photo(root, cell, scale, sides[cell.module]) for cell in held])
    return manifests


def module_folds(folds: int = 5) -> dict[str, int]:
    """A fold from 0 for each module: disjoint by module, and each cell type dealt evenly in keyed order.

    Raises:
        DataRefused: fewer than two folds, or more than there are monocrystalline modules to deal.
    """
    if not MIN_FOLDS <= folds <= MAX_FOLDS:
        raise DataRefused(f"folds: {folds}; choose {MIN_FOLDS} to {MAX_FOLDS}")
    types = {_module(start): _cell_type(_run(start)) for start in MODULE_STARTS}
    dealt: dict[str, int] = {}
    position = 0
    for cell_type in ("mono", "poly"):
        modules = [module for module, its_type in types.items() if its_type == cell_type]
        # Dealing on where the last type stopped keeps the folds' sizes within one module of each other.
        for group in keyed_order(modules, key=FOLD_KEY, tied=_tied(modules)):
            dealt.update(dict.fromkeys(group, position % folds))
            position += 1
    return dict(sorted(dealt.items()))


def _cell(index: int, row: Sequence[str]) -> Cell:
    name, run = f"cell{index + 1:04d}", _run(index)
    cell_type = _cell_type(run)
    if len(row) != len(("image", "probability", "type")) or row[0] != f"images/{name}.png" or row[2] != cell_type:
        raise DataRefused(f"labels.csv line {index + 1}: {row!r}; 'images/{name}.png <probability> {cell_type}' fits")
    if row[1] not in GRADE_OF_PROBABILITY:
        raise DataRefused(f"labels.csv line {index + 1}: {row[1]!r} is not one of {list(GRADE_OF_PROBABILITY)}")
    return Cell(name=name, module=_module(index), run=run, cell_type=cell_type, grade=GRADE_OF_PROBABILITY[row[1]])


def _photo(root: Path, cell: Cell, scale: GradeScale, split: Split) -> Photo:
    path = f"{cell.name}.png"
    return Photo(
        path=path,
        digest=digest_file(root / path),
        item=cell.name,
        source=cell.module,
        grade=scale.labels[cell.grade],
        split=split,
        provenance=Provenance.REAL,
        licence=LICENCE,
        origin=f"{ORIGIN}, {cell.cell_type} {cell.run}",
    )


def _module_index(photo: int) -> int:
    return bisect_right(MODULE_STARTS, photo) - 1


def _module(photo: int) -> str:
    return f"module-{_module_index(photo) + 1:02d}"


def _run(photo: int) -> str:
    return f"run-{bisect_right(RUN_STARTS, _module_index(photo)):02d}"


def _cell_type(run: str) -> str:
    # Runs alternate, beginning with a monocrystalline one.
    return "mono" if int(run.removeprefix("run-")) % 2 else "poly"


def _tied(modules: Sequence[str] | set[str]) -> list[frozenset[str]]:
    return [TIED_MODULES] if set(modules) >= TIED_MODULES else []
