import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.data import manifest as module
from fedgrade.data.manifest import COLUMNS, Photo, Provenance, Split, read_manifest, write_manifest
from fedgrade.errors import DataRefused, FedgradeError
from fedgrade.grading import GradeScale

SCALE = GradeScale(name="phones", labels=("A", "B", "C"), critical=("C",), cost=((0, 1, 2), (1, 0, 1), (2, 1, 0)))


def photo(number=0, **changes):
    fields = {
        "path": f"photos/{number}.png",
        "digest": hashlib.sha256(str(number).encode()).hexdigest(),
        "item": f"item-{number}",
        "source": f"source-{number}",
        "grade": "A",
        "split": Split.TRAIN,
        "provenance": Provenance.REAL,
        "licence": "own",
        "origin": "line 1, camera 2",
    }
    return Photo(**{**fields, **changes})


def csv_of(*rows, columns=COLUMNS):
    return "\n".join([",".join(columns), *rows, ""]).encode()


def row(**changes):
    return ",".join(f'"{value}"' for value in {**dataclasses.asdict(photo()), **changes}.values())


def refusal_of(raw):
    try:
        read_manifest(raw, SCALE)
    except DataRefused as error:
        return str(error)
    return ""


def words():
    return st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(_is_plain)


def _is_plain(text):
    try:
        photo(item=text)
    except DataRefused:
        return False
    return True


@given(st.lists(st.tuples(words(), words(), words()), min_size=1, max_size=6))
def test_reading_what_was_written_gives_it_back(texts):
    photos = tuple(
        photo(number, item=f"{item}{number}", source=f"{source}{number}", origin=origin)
        for number, (item, source, origin) in enumerate(texts)
    )
    raw = write_manifest(photos)
    manifest = read_manifest(raw, SCALE)
    assert manifest.photos == photos
    assert manifest.digest == hashlib.sha256(raw).hexdigest()
    assert write_manifest(manifest.photos) == raw


@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_one_clear_refusal(noise):
    for raw in (noise, csv_of(row()) + noise, csv_of() + noise):
        message = refusal_of(raw)
        assert not message or message.startswith("manifest")


def test_items_are_sorted_by_name_and_keep_all_their_photos():
    photos = (
        photo(0, item="b", source="s", grade="C"),
        photo(1, item="a", source="s"),
        photo(2, item="b", source="s", grade="C"),
        photo(3, item="c", split=Split.TEST),
    )
    manifest = read_manifest(write_manifest(photos), SCALE)
    training = manifest.items(Split.TRAIN)
    assert [(item.name, item.grade, len(item.photos)) for item in training] == [("a", 0, 1), ("b", 2, 2)]
    assert [photo.path for photo in training[1].photos] == ["photos/0.png", "photos/2.png"]
    assert [item.name for item in manifest.items(Split.TEST)] == ["c"]


def test_columns_may_come_in_any_order_behind_a_spreadsheets_mark():
    turned = tuple(reversed(COLUMNS))
    values = [str(value) for value in reversed(dataclasses.asdict(photo(origin="x")).values())]
    raw = b"\xef\xbb\xbf" + csv_of(",".join(values), columns=turned).replace(b"\n", b"\r\n")
    assert read_manifest(raw, SCALE).photos == (photo(origin="x"),)


HEADERS = {
    "unknown": (*COLUMNS, "notes"),
    "unknown or twice": (*COLUMNS, "path"),
    "'origin' is missing": COLUMNS[:-1],
}


@pytest.mark.parametrize(("message", "columns"), HEADERS.items())
def test_a_header_with_other_columns_is_refused(message, columns):
    with pytest.raises(DataRefused, match=f"row 1.*{message}"):
        read_manifest(csv_of(columns=columns), SCALE)


FIELDS = {
    "a path that climbs": ({"path": "../secret.png"}, "must be plain and relative"),
    "a path that climbs later": ({"path": "photos/../../secret.png"}, "must be plain and relative"),
    "an absolute path": ({"path": "/etc/passwd"}, "must be plain and relative"),
    "a backslash": ({"path": "..\\secret.png"}, "must be plain and relative"),
    "a path with a detour": ({"path": "photos/./0.png"}, "must be plain and relative"),
    "a path with a double slash": ({"path": "photos//0.png"}, "must be plain and relative"),
    "the folder itself": ({"path": "."}, "must be plain and relative"),
    "NUL": ({"path": "photos/0.png\0.txt"}, "control characters"),
    "a line break": ({"item": "one\ntwo"}, "control characters"),
    "a mark that turns the writing round": ({"item": "a\u202eb"}, "control characters"),
    "a field of spaces": ({"source": "  "}, "is empty"),
    "a padded name": ({"item": "item-1 "}, "padded"),
    "an empty field": ({"licence": ""}, "is empty"),
    "an endless field": ({"origin": "x" * 501}, "longer than 500"),
    "letters that only look equal": ({"item": "e\u0301"}, "NFC"),
    "a short digest": ({"digest": "abc"}, "64 lower-case hexadecimal"),
    "a digest in capitals": ({"digest": "A" * 64}, "64 lower-case hexadecimal"),
    "a grade off the scale": ({"grade": "D"}, "'D' is not one of"),
    "an unknown split": ({"split": "validation"}, "split 'validation' is not one of"),
    "an unknown provenance": ({"provenance": "dreamt"}, "provenance 'dreamt' is not one of"),
    "synthetic in the test split": ({"split": "test", "provenance": "synthetic"}, "measured on real photos"),
}


@pytest.mark.parametrize(("changes", "message"), FIELDS.values(), ids=FIELDS.keys())
def test_a_bad_field_is_refused_with_its_row(changes, message):
    good = row(path="photos/good.png", digest="0" * 64, item="good", source="good")
    with pytest.raises(DataRefused, match=message) as refusal:
        read_manifest(csv_of(good, row(**changes)), SCALE)
    assert str(refusal.value).startswith("manifest row 3: ")


TOGETHER = {
    "the same path": ({"digest": "1" * 64}, "path 'photos/0.png' is named twice"),
    "the same bytes": ({"path": "copy.png"}, "the same photo, counted twice"),
    "an item with two grades": ({"path": "x", "digest": "1" * 64, "grade": "B"}, "has grade 'B' and 'A'"),
    "an item in two splits": ({"path": "x", "digest": "1" * 64, "split": Split.TEST}, "has split 'test' and 'train'"),
    "an item of two sources": ({"path": "x", "digest": "1" * 64, "source": "s"}, "has source 's' and 'source-0'"),
    "a source on both sides": (
        {"path": "x", "digest": "1" * 64, "item": "other", "split": Split.TEST},
        "'source-0' is in both splits",
    ),
}


@pytest.mark.parametrize(("changes", "message"), TOGETHER.values(), ids=TOGETHER.keys())
def test_rows_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(DataRefused, match=f"row 3: .*{message}"):
        read_manifest(write_manifest((photo(), photo(**changes))), SCALE)


def synthetic_share(synthetic, real):
    kinds = [Provenance.SYNTHETIC] * synthetic + [Provenance.REAL] * real
    return write_manifest(tuple(photo(number, provenance=kind) for number, kind in enumerate(kinds)))


def test_one_synthetic_photo_in_ten_is_accepted_and_more_refused():
    assert len(read_manifest(synthetic_share(1, 9), SCALE).photos) == 10
    with pytest.raises(DataRefused, match=r"11\.1% of the training photos are synthetic; the ceiling is 10\.0%"):
        read_manifest(synthetic_share(1, 8), SCALE)


def test_the_synthetic_ceiling_is_the_jobs_to_set():
    assert len(read_manifest(synthetic_share(5, 5), SCALE, synthetic_ceiling=0.5).photos) == 10
    with pytest.raises(DataRefused, match=r"the ceiling is 0\.0%"):
        read_manifest(synthetic_share(1, 99), SCALE, synthetic_ceiling=0.0)


def test_test_photos_do_not_dilute_the_synthetic_share():
    training = (photo(0, provenance=Provenance.SYNTHETIC), photo(1))
    tests = tuple(photo(number, split=Split.TEST) for number in range(2, 40))
    with pytest.raises(DataRefused, match=r"50\.0% of the training photos"):
        read_manifest(write_manifest(training + tests), SCALE)


def test_a_row_with_a_field_too_many_is_refused():
    with pytest.raises(DataRefused, match="row 2: 10 fields where the header has 9"):
        read_manifest(csv_of(row() + ",more"), SCALE)


def test_an_open_quotation_mark_is_refused():
    with pytest.raises(DataRefused, match="row 2: not CSV"):
        read_manifest(csv_of('"photos/0.png'), SCALE)


def test_a_manifest_of_nothing_is_refused():
    for raw in (b"", csv_of()):
        with pytest.raises(DataRefused, match="names no photo"):
            read_manifest(raw, SCALE)


def test_other_encodings_are_refused():
    with pytest.raises(DataRefused, match="not UTF-8"):
        read_manifest(csv_of(row(origin="Prüfstand")).decode().encode("latin-1"), SCALE)


def test_too_many_bytes_and_too_many_rows_are_refused(monkeypatch):
    raw = write_manifest((photo(0), photo(1)))
    monkeypatch.setattr(module, "MAX_PHOTOS", 1)
    with pytest.raises(DataRefused, match="row 3: the limit is 1 photos"):
        read_manifest(raw, SCALE)
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", len(raw) - 1)
    with pytest.raises(DataRefused, match="the limit is"):
        read_manifest(raw, SCALE)


def test_a_photo_that_no_manifest_could_hold_cannot_be_made():
    with pytest.raises(FedgradeError, match="plain and relative"):
        photo(path="../x")
