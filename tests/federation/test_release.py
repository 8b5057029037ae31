from dataclasses import replace

import numpy as np
import pytest

from fedgrade.errors import DocumentRefused, ModelRefused, SignatureRefused
from fedgrade.evaluation import ConfusionCounts, metrics
from fedgrade.federation import release as release_module
from fedgrade.federation.payloads import Head, write_head
from fedgrade.federation.release import ModelRelease, open_release, publish
from fedgrade.federation.store import Folder
from fedgrade.job import plan_job
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import SigningKey
from tests.federation.small_federation import DECLARED, NAMES, SCALE, SPEC

KEY = SigningKey.generate()
JOB = plan_job(SPEC, declared_items=dict.fromkeys(NAMES, DECLARED), nonce="0")
HEAD = Head(thresholds=np.full(JOB.head_shape(), 0.5), centre=np.zeros(JOB.head_shape()[1] - 1))
COUNTS = ConfusionCounts.of(np.diag([5.0, 4.0, 3.0]))
RELEASE = ModelRelease(
    job=JOB,
    weights_digest=digest(write_head(HEAD)),
    counts=COUNTS,
    metrics=metrics(COUNTS, SCALE),
    contributions=dict.fromkeys(NAMES, 4),
    published="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def folder(tmp_path):
    publish(RELEASE, HEAD, to=Folder(tmp_path / "release"), key=KEY)
    return tmp_path / "release"


def test_what_was_published_is_opened(folder):
    opened = open_release(folder, signed_by=KEY.public)
    assert opened.release == RELEASE
    assert np.array_equal(opened.head.thresholds, HEAD.thresholds)
    assert opened.digest == digest((folder / "release.json").read_bytes())
    assert {path.name for path in folder.iterdir()} == {"release.json", "weights.safetensors"}


def test_weights_that_the_document_does_not_name_are_not_published(tmp_path):
    other = replace(HEAD, thresholds=HEAD.thresholds * 2)
    with pytest.raises(ModelRefused, match="not those that the document names"):
        publish(RELEASE, other, to=Folder(tmp_path / "release"), key=KEY)
    assert not (tmp_path / "release").exists()


def test_weights_that_changed_are_refused_and_named(folder):
    weights = folder / "weights.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ModelRefused, match=r"weights\.safetensors is not the file that was signed for"):
        open_release(folder, signed_by=KEY.public)


@pytest.mark.parametrize("name", ["release.json", "weights.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DocumentRefused, match=f"{name}: cannot be read"):
        open_release(folder, signed_by=KEY.public)


def test_a_release_by_someone_else_is_refused_and_named(folder):
    with pytest.raises(SignatureRefused, match=f"release {folder}: .*signed by key"):
        open_release(folder, signed_by=SigningKey.generate().public)


def test_a_file_above_the_limit_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(release_module, "MAX_BYTES", 100)
    with pytest.raises(DocumentRefused, match="bytes; the limit is 100"):
        open_release(folder, signed_by=KEY.public)


def test_weights_of_another_shape_are_refused_even_when_signed(tmp_path):
    wide = Head(thresholds=np.zeros((7, 3)), centre=np.zeros(2))
    publish(replace(RELEASE, weights_digest=digest(write_head(wide))), wide, to=Folder(tmp_path), key=KEY)
    with pytest.raises(ModelRefused):
        open_release(tmp_path, signed_by=KEY.public)
