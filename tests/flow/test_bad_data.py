"""Bad photos and manifests, read as a partner's own door reads them: refused at admission, details kept at home."""

import errno
import hashlib
import struct
import zlib
from dataclasses import replace

import pytest

from clients.configure import LocalPhotos
from clients.settings import CohortSettings, LinkSettings, SiteFolder, SiteSettings
from fedgrade.data import assets
from fedgrade.data.manifest import Split, read_manifest, write_manifest
from fedgrade.errors import DataRefused, JobRefused
from fedgrade.federation.messages import Admitted, Refusal
from tests.federation.small_federation import MODEL, NAMES, SCALE, ask
from tests.federation.small_photos import photo_bytes

SITE = NAMES[0]


def local_photos(federation, backbones="backbones"):
    """The partner's own reader of photos, with the real backbone behind it."""
    settings = SiteSettings(
        site=SITE, key="key.pem", roster="roster.json", policy="policy.yaml", photos="photos",
        lineage="squares", photos_per_item=9,
        cohorts={"2026": CohortSettings(manifest="manifest.csv", declared_items=8)},
        ledger="ledger.jsonl", outbox="outbox", cache="cache",
        backbones=str(backbones), threads=1, device="cpu", socket="run/agent.sock",
        link=LinkSettings(address="127.0.0.1:0", root_certificate="ca.pem", node_key="node_key"),
    )  # fmt: skip
    return LocalPhotos(site=SiteFolder(settings=settings, folder=federation.folder(SITE)))


def manifest_of(federation):
    path = federation.folder(SITE) / "manifest.csv"
    return path, list(read_manifest(path.read_bytes(), SCALE).photos)


def replaced(federation, raw):
    """The first photo's file is ``raw``, and the manifest says so."""
    path, photos = manifest_of(federation)
    (federation.folder(SITE) / "photos" / photos[0].path).write_bytes(raw)
    photos[0] = replace(photos[0], digest=hashlib.sha256(raw).hexdigest())
    path.write_bytes(write_manifest(photos))


def bomb(side=60_000):
    """A PNG of a few hundred bytes that says it is ``side`` by ``side`` pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def truncated_photo(federation):
    replaced(federation, photo_bytes(0, 1)[:-40])


def photo_of_many_pixels(federation):
    replaced(federation, bomb())


def text_for_a_photo(federation):
    replaced(federation, b"<script>alert(1)</script>")


def photo_changed_on_disk(federation):
    _, photos = manifest_of(federation)
    (federation.folder(SITE) / "photos" / photos[0].path).write_bytes(photo_bytes(1, 99))


def photo_missing(federation):
    _, photos = manifest_of(federation)
    (federation.folder(SITE) / "photos" / photos[0].path).unlink()


def photo_is_a_link(federation):
    _, photos = manifest_of(federation)
    path = federation.folder(SITE) / "photos" / photos[0].path
    outside = federation.root / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)


def row_changed(old, new):
    def change(federation):
        path = federation.folder(SITE) / "manifest.csv"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def duplicate_item(federation):
    """One item twice, under two grades: the second would be another item of the same name."""
    path, photos = manifest_of(federation)
    train = [photo for photo in photos if photo.split is Split.TRAIN]
    other = next(photo for photo in train if photo.grade != train[0].grade)
    photos[photos.index(other)] = replace(other, item=train[0].item, source=train[0].source)
    path.write_bytes(write_manifest(photos))


def duplicate_photo(federation):
    path, photos = manifest_of(federation)
    (federation.folder(SITE) / "photos" / "copy.png").write_bytes(
        (federation.folder(SITE) / "photos" / photos[0].path).read_bytes()
    )
    photos.append(replace(photos[0], path="copy.png"))
    path.write_bytes(write_manifest(photos))


HARMS = [
    (photo_changed_on_disk, "changed on disk"),
    (photo_missing, "No such file"),
    (photo_is_a_link, "without links"),
    (row_changed("0000-0.png", "../0000-0.png"), "without '..'"),
    (row_changed("0000-0.png", "/etc/passwd"), "relative to the photo folder"),
    (row_changed(",A,", ",Z,"), "grade 'Z' is not one of"),
    (row_changed(",train,", ",both,"), "not one of"),
    (duplicate_item, "has grade"),
    (duplicate_photo, "the same photo, counted twice"),
]


def refused_at_admission(federation, caplog, detail, photos):
    """The site says "data" and nothing more, and its ledger holds nothing but its genesis."""
    job = federation.job()
    with federation.site(photos=photos) as site:
        body = federation.opened(site.answer(federation.admission(job))).document.body
        late = federation.opened(site.answer(federation.question(job, ask("centre")))).document.body
    assert body == Refusal(code="data", reason="this site's own operator can see why in its log")
    assert late.kind == "refusal"
    assert detail in caplog.text
    assert [entry.body.kind for entry in federation.entries(SITE)] == ["genesis"]


@pytest.mark.parametrize(("harm", "detail"), HARMS, ids=[detail for _, detail in HARMS])
def test_bad_data_is_refused_before_anything_is_written(federation, caplog, harm, detail):
    harm(federation)
    refused_at_admission(federation, caplog, detail, local_photos(federation))


@pytest.mark.parametrize(
    ("harm", "detail"),
    [
        (truncated_photo, "not a whole PNG or JPEG"),
        (photo_of_many_pixels, "DecompressionBomb"),
        (text_for_a_photo, "not a whole PNG or JPEG"),
    ],
)
def test_a_photo_that_does_not_decode_is_refused_before_anything_is_written(
    federation, caplog, backbones, harm, detail
):
    harm(federation)
    refused_at_admission(federation, caplog, detail, local_photos(federation, backbones))


def test_a_feature_cache_without_room_is_no_reason_to_leave_the_job(federation, backbones, monkeypatch, caplog):
    """Nobody decided anything, nothing was charged: the site is asked again, and its paths stay at home."""
    job, written = federation.job(), assets._write_privately

    def full(path, _content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(assets, "_write_privately", full)
    with federation.site(photos=local_photos(federation, backbones)) as site:
        body = federation.opened(site.answer(federation.admission(job))).document.body
        assert body == Refusal(code="ledger", reason="this site's own operator can see why in its log")
        assert "feature cache" in caplog.text
        monkeypatch.setattr(assets, "_write_privately", written)
        assert isinstance(federation.opened(site.answer(federation.admission(job))).document.body, Admitted)


def test_a_backbone_cache_that_cannot_be_made_stays_at_home_too(federation, caplog):
    job = federation.job()
    (federation.folder(SITE) / "occupied").write_bytes(b"")
    with federation.site(photos=local_photos(federation, federation.folder(SITE) / "occupied" / "backbones")) as site:
        body = federation.opened(site.answer(federation.admission(job))).document.body
    assert body == Refusal(code="ledger", reason="this site's own operator can see why in its log")
    assert "occupied" in caplog.text


def test_what_devices_a_machine_has_stays_at_home(federation, monkeypatch, caplog):
    def gone(*_arguments, **_named):
        raise JobRefused("device cuda:1: this machine has 1 GPU, an H200 of the south hall")

    monkeypatch.setattr("clients.configure.extractor", gone)
    refused_at_admission(federation, caplog, "south hall", local_photos(federation, "others"))


def test_good_data_is_admitted_and_answered_by_the_same_reader(federation, backbones):
    job = federation.job()
    with federation.site(photos=local_photos(federation, backbones)) as site:
        assert isinstance(federation.opened(site.answer(federation.admission(job))).document.body, Admitted)
        reply = federation.opened(site.answer(federation.question(job, ask("centre"))))
    assert reply.document.body.kind == "contribution"
    cached = list((federation.folder(SITE) / "cache").glob("features-*"))
    assert [path.stat().st_mode & 0o077 for path in cached] == [0]


def test_a_photo_that_changes_after_admission_does_not_enter_a_round_unnoticed(federation, backbones):
    """Features are kept under the digest of the bytes they were taken from, so a changed file changes nothing."""
    job, photos = federation.job(), local_photos(federation, backbones)
    with federation.site(photos=photos) as site:
        site.answer(federation.admission(job))
    photo_changed_on_disk(federation)
    with federation.site(photos=photos) as site:
        reply = federation.opened(site.answer(federation.question(job, ask("centre"))))
        again = federation.opened(site.answer(federation.admission(job))).document.body
    assert reply.document.body.kind == "contribution"
    assert again.code == "data"


def test_details_of_bad_data_never_leave(federation):
    photo_missing(federation)
    with pytest.raises(DataRefused) as home:
        local_photos(federation).prepare(MODEL, manifest_of(federation)[1])
    with federation.site(photos=local_photos(federation)) as site:
        sent = site.answer(federation.admission(federation.job()))
    assert "0000-0.png" in str(home.value)
    assert b"0000-0" not in sent
