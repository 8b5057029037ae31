"""Bundles: what was signed for is opened; whatever was changed, added, linked or taken away is named and refused."""

import os
import shutil
from dataclasses import dataclass

import numpy as np
import pytest

from fedgrade.errors import DocumentRefused, FedgradeError, LedgerBroken, SignatureRefused
from fedgrade.evaluation import ConfusionCounts, metrics
from fedgrade.federation.bundle import (
    CARD,
    INDEX,
    ONNX,
    BundledFile,
    ReleaseIndex,
    open_bundle,
    open_model,
    require_receipts,
    write_bundle,
)
from fedgrade.federation.payloads import Head, write_head
from fedgrade.federation.release import DOCUMENT, WEIGHTS, ModelRelease
from fedgrade.job import plan_job
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import seal
from fedgrade.trust.identity import Roster, SigningKey
from fedgrade.trust.ledger import Entry
from fedgrade.trust.records import Abort, Commit
from tests.federation.small_federation import DECLARED, NAMES, SCALE, SPEC

KEY = SigningKey.generate()
SITE_KEYS = {name: SigningKey.generate() for name in NAMES}
ROSTER = Roster(coordinator=KEY.public, sites={name: key.public for name, key in SITE_KEYS.items()})
JOB = plan_job(SPEC, declared_items=dict.fromkeys(NAMES, DECLARED), nonce="0")
HEAD = Head(thresholds=np.full(JOB.head_shape(), 0.5), centre=np.zeros(JOB.head_shape()[1] - 1))
COUNTS = ConfusionCounts.of(np.diag([5.0, 4.0, 3.0]))
STAGES = (("centre", 0), ("train", 0), ("train", 1), ("evaluate", 0))
RELEASE = ModelRelease(
    job=JOB,
    weights_digest=digest(write_head(HEAD)),
    counts=COUNTS,
    metrics=metrics(COUNTS, SCALE),
    contributions=dict.fromkeys(NAMES, len(STAGES)),
    published="2026-01-01T00:00:00+00:00",
)


def entry(number, body):
    return Entry(sequence=number, previous="0" * 64, time="2026-01-01T00:00:00.000000+00:00", body=body)


def receipt(number, purpose, round_index, *, job=JOB.digest):
    body = Commit(
        reserve=1, job=job, round_index=round_index, attempt=0, purpose=purpose, message_digest=f"{number:064x}"
    )
    return entry(number, body)


def receipts(name, entries=None):
    found = entries if entries is not None else [receipt(number, *stage) for number, stage in enumerate(STAGES)]
    return b"".join(seal(one, SITE_KEYS[name]) + b"\n" for one in found)


CONTENTS = {
    DOCUMENT: seal(RELEASE, KEY),
    WEIGHTS: write_head(HEAD),
    ONNX: b"an ONNX file, as far as this room knows",
    CARD: b"<!DOCTYPE html>",
    **{f"receipts/{name}.jsonl": receipts(name) for name in NAMES},
}


def index_of(contents, **changes):
    facts = {
        "release": digest(CONTENTS[DOCUMENT]),
        "previous": "",
        "asset_type": "square",
        "files": {name: BundledFile.of(content) for name, content in contents.items()},
    }
    return ReleaseIndex(**{**facts, **changes})


def write(folder, contents=CONTENTS, *, key=KEY, record=lambda _: None, **changes):
    return write_bundle(contents, index=index_of(contents, **changes), folder=folder, key=key, record=record)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_what_was_published_is_opened(tmp_path):
    recorded = []
    made = write(tmp_path / "bundle", record=recorded.append, previous="a" * 64)
    opened = open_bundle(tmp_path / "bundle", signed_by=KEY.public)
    assert opened.release.release == RELEASE
    assert np.array_equal(opened.release.head.thresholds, HEAD.thresholds)
    assert (opened.model, opened.index.previous) == (CONTENTS[ONNX], "a" * 64)
    assert recorded == [made] == [opened.digest]
    assert require_receipts(opened, ROSTER) == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_bundle_passes_where_a_release_is_wanted_and_so_does_a_release(folder):
    assert open_model(folder, signed_by=KEY.public).release == RELEASE
    (folder / ONNX).write_bytes(b"swapped")
    with pytest.raises(DocumentRefused, match=r"model\.onnx"):
        open_model(folder, signed_by=KEY.public)
    (folder / INDEX).unlink()
    assert open_model(folder, signed_by=KEY.public).release == RELEASE


@pytest.mark.parametrize("name", [INDEX, *CONTENTS])
def test_one_flipped_byte_in_any_file_is_refused(folder, name):
    raw = (folder / name).read_bytes()
    for position in {0, len(raw) // 2, len(raw) - 1}:
        (folder / name).write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(FedgradeError, match=name):
            open_bundle(folder, signed_by=KEY.public)


@pytest.mark.parametrize("name", [INDEX, *CONTENTS])
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DocumentRefused, match=f"{name}.*(is missing|cannot be read)"):
        open_bundle(folder, signed_by=KEY.public)


@pytest.mark.parametrize("name", [INDEX, *CONTENTS])
def test_a_file_that_grew_is_refused_before_it_is_read(folder, name):
    with (folder / name).open("ab") as file:
        file.truncate(file.tell() + 2**30)
    with pytest.raises(DocumentRefused, match=f"{name} is no plain file of at most"):
        open_bundle(folder, signed_by=KEY.public)


@pytest.mark.parametrize("name", ["more.txt", "receipts/stranger.jsonl", ".hidden", "model.onnx\n"])
def test_a_file_too_many_is_refused(folder, name):
    (folder / name).write_bytes(b"")
    with pytest.raises(DocumentRefused, match="is not in its signed index"):
        open_bundle(folder, signed_by=KEY.public)


@pytest.mark.parametrize("name", ["more", "receipts/more"])
def test_a_folder_too_many_is_refused(folder, name):
    (folder / name).mkdir()
    with pytest.raises(DocumentRefused, match="is no plain file"):
        open_bundle(folder, signed_by=KEY.public)


@pytest.mark.parametrize("name", [INDEX, *CONTENTS])
def test_a_link_is_not_followed_even_to_the_same_bytes(folder, tmp_path, name):
    kept = tmp_path / "kept"
    (folder / name).rename(kept)
    (folder / name).symlink_to(kept)
    with pytest.raises(DocumentRefused, match=f"{name}.*(is no plain file|cannot be read)"):
        open_bundle(folder, signed_by=KEY.public)


def test_a_linked_folder_of_receipts_is_not_followed(folder, tmp_path):
    (folder / "receipts").rename(tmp_path / "kept")
    (folder / "receipts").symlink_to(tmp_path / "kept")
    with pytest.raises(DocumentRefused, match="'receipts' is no plain file"):
        open_bundle(folder, signed_by=KEY.public)


def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(folder):
    (folder / CARD).unlink()
    os.mkfifo(folder / CARD)
    with pytest.raises(DocumentRefused, match=r"card\.html"):
        open_bundle(folder, signed_by=KEY.public)


def test_another_coordinators_bundle_is_refused(folder):
    with pytest.raises(SignatureRefused, match=f"bundle {folder}: index.json: .*signed by key"):
        open_bundle(folder, signed_by=SigningKey.generate().public)


def test_a_release_by_someone_else_in_a_signed_bundle_is_refused(tmp_path):
    foreign = {**CONTENTS, DOCUMENT: seal(RELEASE, SigningKey.generate())}
    write(tmp_path / "bundle", foreign, release=digest(foreign[DOCUMENT]))
    with pytest.raises(SignatureRefused, match="signed by key"):
        open_bundle(tmp_path / "bundle", signed_by=KEY.public)


@dataclass(frozen=True, kw_only=True)
class _Unchecked:
    """An index as a coordinator could sign it that does not keep to its own type."""

    schema: str
    release: str
    previous: str
    asset_type: str
    files: dict[str, BundledFile]


_Unchecked.__name__ = "ReleaseIndex"


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "receipts/../../outside.jsonl",
        "receipts/a/b.jsonl",
        "receipts/.jsonl",
        "",
        "a\x00b",
    ],
)
def test_a_path_in_a_name_is_refused_although_it_is_signed(folder, name):
    index = index_of(CONTENTS)
    strange = _Unchecked(**{**vars(index), "files": {**index.files, name: BundledFile.of(b"")}})
    (folder.parent / "outside").write_bytes(b"")
    (folder / INDEX).write_bytes(seal(strange, KEY))
    with pytest.raises(DocumentRefused, match="has no place in it"):
        open_bundle(folder, signed_by=KEY.public)


@pytest.mark.parametrize("name", [DOCUMENT, WEIGHTS, ONNX, CARD])
def test_a_bundle_without_one_of_its_parts_is_none(name):
    with pytest.raises(DocumentRefused, match=f"'{name}' is missing"):
        index_of({other: content for other, content in CONTENTS.items() if other != name})


def test_an_index_that_contradicts_itself_or_its_release_is_refused(tmp_path):
    with pytest.raises(DocumentRefused, match="is not the release that it names"):
        index_of(CONTENTS, release="0" * 64)
    with pytest.raises(DocumentRefused, match="previous"):
        index_of(CONTENTS, previous="the last one")
    with pytest.raises(DocumentRefused, match="a SHA-256 and at most"):
        BundledFile(digest="0" * 64, size=-1)
    write(tmp_path / "bundle", asset_type="pump")
    with pytest.raises(DocumentRefused, match="its release another asset type"):
        open_bundle(tmp_path / "bundle", signed_by=KEY.public)


def receipted(tmp_path, name, raw):
    contents = {**CONTENTS, f"receipts/{name}.jsonl": raw}
    write(tmp_path / "bundle", contents)
    return open_bundle(tmp_path / "bundle", signed_by=KEY.public)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([receipt(number, *stage) for number, stage in enumerate(STAGES[:-1])], "3 receipts of recycler-b; .* 4"),
        ([receipt(number, "train", 0) for number in range(4)], "two receipts of recycler-b are for one round"),
        ([receipt(number, *stage, job="1" * 64) for number, stage in enumerate(STAGES)], "is not for this job"),
        ([entry(number, Abort(reserve=1, reason="x")) for number in range(4)], "is not for this job"),
    ],
)
def test_receipts_that_the_release_does_not_count_are_refused(tmp_path, entries, said):
    with pytest.raises(LedgerBroken, match=said):
        require_receipts(receipted(tmp_path, NAMES[1], receipts(NAMES[1], entries)), ROSTER)


def test_receipts_by_another_site_are_refused(tmp_path):
    with pytest.raises(LedgerBroken, match=r"receipt 1 of recycler-b: .*signed by key"):
        require_receipts(receipted(tmp_path, NAMES[1], receipts(NAMES[0])), ROSTER)


def test_a_site_without_receipts_is_named(tmp_path):
    contents = {name: raw for name, raw in CONTENTS.items() if NAMES[2] not in name}
    write(tmp_path / "bundle", contents)
    with pytest.raises(LedgerBroken, match=f"receipts of {NAMES[2]}"):
        require_receipts(open_bundle(tmp_path / "bundle", signed_by=KEY.public), ROSTER)


def test_sites_that_are_not_on_the_verifiers_roster_are_told(folder):
    shorter = Roster(coordinator=KEY.public, sites={NAMES[0]: SITE_KEYS[NAMES[0]].public})
    assert require_receipts(open_bundle(folder, signed_by=KEY.public), shorter) == NAMES[1:]


def test_a_bundle_is_never_written_over_anything(folder, tmp_path):
    before = (folder / INDEX).read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for occupied in (folder, tmp_path / "link", tmp_path / "file"):
        with pytest.raises(DocumentRefused, match="exists and is not overwritten"):
            write(occupied)
    assert (folder / INDEX).read_bytes() == before
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")


def test_what_the_record_refuses_leaves_nothing_behind(tmp_path):
    def refuse(_):
        assert not (tmp_path / "bundle").exists()
        raise LedgerBroken("no")

    with pytest.raises(LedgerBroken, match="no"):
        write(tmp_path / "bundle", record=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_leaves_nothing_behind(tmp_path):
    with pytest.raises(DocumentRefused, match=r"cannot be written \(File name too long\)"):
        write(tmp_path / ("a" * 250))
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_a_bundle_is_a_bundle(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert open_bundle(tmp_path / "copy", signed_by=KEY.public).digest == digest((folder / INDEX).read_bytes())
