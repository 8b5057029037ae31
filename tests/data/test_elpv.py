import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedgrade.data import elpv
from fedgrade.data.manifest import Split, read_manifest
from fedgrade.data.photos import PhotoLimits, open_photo, verify_photos
from fedgrade.errors import DataRefused
from fedgrade.grading import GradeScale

pytest.importorskip("elpv_dataset", reason="the demo's photos (elpv-dataset) are not installed")

SCALE = GradeScale(
    name="cells",
    labels=("sound", "doubtful", "likely defective", "defective"),
    critical=("defective",),
    cost=((0, 1, 2, 3), (1, 0, 1, 2), (2, 1, 0, 1), (3, 2, 1, 0)),
)
SHARED = Path(__file__).parents[3] / "shared" / "data" / "elpv" / "manifest.csv"


@pytest.fixture(scope="module")
def manifests():
    return {site: read_manifest(raw, SCALE) for site, raw in elpv.site_manifests(SCALE).items()}


def test_there_are_44_modules_in_ten_runs_with_the_published_counts():
    cells = elpv.cells()
    assert len(elpv.MODULE_STARTS) == len({cell.module for cell in cells}) == 44
    assert len({cell.run for cell in cells}) == 10
    assert Counter(cell.cell_type for cell in cells) == {"mono": 1074, "poly": 1550}
    assert Counter(cell.grade for cell in cells) == {0: 1508, 1: 295, 2: 106, 3: 715}
    modules = {cell.module: cell.cell_type for cell in cells}
    assert Counter(modules.values()) == {"mono": 18, "poly": 26}
    assert set(Counter(cell.module for cell in cells).values()) == {48, 50, 54, 60, 72}


@pytest.mark.skipif(not SHARED.is_file(), reason=f"{SHARED.name} of the shared ELPV data is not beside this checkout")
def test_module_grade_and_run_agree_with_the_shared_manifest_for_every_photo():
    with SHARED.open(newline="") as file:
        theirs = {Path(row["image"]).stem: row for row in csv.DictReader(file)}
    assert len(theirs) == 2624
    for cell in elpv.cells():
        row = theirs[cell.name]
        assert (cell.module, cell.run, str(cell.grade)) == (row["source_id"], row["capture_run"], row["grade"])


def test_five_recyclers_hold_every_photo_once(manifests):
    assert sorted(manifests) == ["recycler-a", "recycler-b", "recycler-c", "recycler-d", "recycler-e"]
    photos = [photo for manifest in manifests.values() for photo in manifest.photos]
    assert len(photos) == 2624
    assert len({photo.path for photo in photos}) == len({photo.digest for photo in photos}) == 2624


def test_no_module_is_on_both_sides_or_at_two_recyclers(manifests):
    places = {(photo.source, photo.split, site) for site, each in manifests.items() for photo in each.photos}
    assert len(places) == len({source for source, _, _ in places}) == 44


def test_every_recycler_tests_on_a_module_and_together_they_test_every_grade(manifests):
    tested = Counter()
    for manifest in manifests.values():
        items = manifest.items(Split.TEST)
        assert 0.1 < len(items) / len(manifest.photos) < 0.4
        tested.update(item.grade for item in items)
    assert set(tested) == {0, 1, 2, 3}


def test_the_tied_modules_are_on_the_same_side(manifests):
    sides = {photo.split for photo in manifests["recycler-e"].photos if photo.source in elpv.TIED_MODULES}
    assert len(sides) == 1


def test_the_photos_are_where_the_manifests_say(manifests):
    root = elpv.package_photos()
    verify_photos(manifests["recycler-a"].photos, root, PhotoLimits())
    assert open_photo(root, manifests["recycler-b"].photos[0], PhotoLimits()).shape == (300, 300, 3)


def test_manifests_are_the_same_every_time_and_another_key_splits_otherwise():
    first = elpv.site_manifests(SCALE)
    assert elpv.site_manifests(SCALE) == first
    assert elpv.site_manifests(SCALE, split_key=b"another key, long enough") != first


def test_the_licence_goes_with_every_photo(manifests):
    assert {photo.licence for each in manifests.values() for photo in each.photos} == {"CC BY-NC-SA 4.0"}
    assert "10.1016/j.solener.2019.02.067" in elpv.CITATION


def test_another_number_of_grades_is_refused():
    two = GradeScale(name="two", labels=("A", "B"), critical=(), cost=((0, 1), (1, 0)))
    with pytest.raises(DataRefused, match="the demo's photos have 4"):
        elpv.site_manifests(two)


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_are_disjoint_by_module_and_even_in_each_cell_type(folds):
    dealt = elpv.module_folds(folds)
    assert len(dealt) == 44
    assert dealt["module-30"] == dealt["module-31"]
    types = {cell.module: cell.cell_type for cell in elpv.cells()}
    for cell_type in ("mono", "poly"):
        sizes = Counter(fold for module, fold in dealt.items() if types[module] == cell_type)
        assert set(sizes) == set(range(folds))
        assert max(sizes.values()) - min(sizes.values()) <= 2


def test_every_one_of_five_folds_has_every_grade():
    dealt = elpv.module_folds()
    assert len({(dealt[cell.module], cell.grade) for cell in elpv.cells()}) == 20


@pytest.mark.parametrize("folds", [-1, 0, 1, 19])
def test_too_few_or_too_many_folds_are_refused(folds):
    with pytest.raises(DataRefused, match="choose 2 to 18"):
        elpv.module_folds(folds)


def labels():
    return (elpv.package_photos().parent / "labels.csv").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"cell0001.png", b"cell9999.png", "line 1: "),
        (b"cell0001.png", b"../../x.png", "line 1: "),
        (b"cell0001.png  1.0 ", b"cell0001.png  0.5 ", "'0.5' is not one of"),
        (b"cell0001.png  1.0 ", b"cell0001.png  nan ", "'nan' is not one of"),
        (b"mono\n", b"poly\n", "line 1: "),
        (b"mono\n", b"mono 1\n", "line 1: "),
        (b"mono\n", b"mono\n\n", "2625 lines"),
        (b"mono\n", b"mono\xff\n", "not ASCII"),
    ],
)
def test_labels_that_are_not_the_packages_are_refused(old, new, message):
    with pytest.raises(DataRefused, match=message):
        elpv.read_labels(labels().replace(old, new, 1))


def test_finding_the_photos_does_not_run_the_package():
    code = "import sys; from fedgrade.data import elpv; elpv.cells(); assert 'elpv_dataset' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
