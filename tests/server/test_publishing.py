"""From a finished job to a bundle in somebody else's hands: whole folders, real ledgers, a real ONNX file.

The backbone is a small one that was put where an exported one is kept; everything else is what production runs.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fedgrade.cli import cli
from fedgrade.errors import DocumentRefused, JobRefused, LedgerBroken, LedgerUnavailable, ModelRefused, SignatureRefused
from fedgrade.federation.bundle import CARD, INDEX, ONNX, BundledFile, open_bundle, require_receipts, write_bundle
from fedgrade.federation.grading_desk import grade_photos
from fedgrade.federation.registry import lineage, registry, release_of
from fedgrade.federation.verification import verify_federation
from fedgrade.trust.identity import Roster, SigningKey
from fedgrade.trust.ledger import read_ledger
from fedgrade.trust.records import Released
from server.coordinator_folder import CoordinatorFolder
from tests.federation.small_federation import MODEL, NAMES, SCALE, SmallFederation, quick_noise, with_privacy

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - after the skips

from fedgrade.federation.portable_release import MAX_DIFFERENCE, portable_release, require_equal  # noqa: E402
from fedgrade.model.backbones import extractor_digest  # noqa: E402
from server.publishing import Wish, publish_bundle  # noqa: E402

# What a compliance laptop does not have.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "flwr", "opacus", "timm", "opendp", "onnx", "onnxruntime", "hydra"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""
NEWEST = Wish(job="", licence="", partial=False)
PATCH = 28  # pixels that are averaged


def small_backbone():
    """Photos [n, 3, 224, 224] to features [n, 1280]: patches' means, projected."""
    side = MODEL.input_size // PATCH
    numbers = np.random.default_rng(0).normal(size=(3 * side * side, MODEL.feature_dimensions)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["photos"], ["pooled"], kernel_shape=[PATCH] * 2, strides=[PATCH] * 2),
        helper.make_node("Reshape", ["pooled", "shape"], ["row"]),
        helper.make_node("MatMul", ["row", "numbers"], ["features"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([-1, len(numbers)]), "shape"),
        numpy_helper.from_array(numbers, "numbers"),
    ]
    photos = helper.make_tensor_value_info("photos", TensorProto.FLOAT, ["photos", 3, 224, 224])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["photos", MODEL.feature_dimensions])
    graph = helper.make_graph(nodes, "small", [photos], [features], initializer=constants)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return model.SerializeToString()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder, raw = tmp_path_factory.mktemp("backbones"), small_backbone()
    (folder / f"backbone-{extractor_digest(MODEL)}.onnx").write_bytes(hashlib.sha256(raw).digest() + raw)
    return folder


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Two jobs for one asset type, both released."""
    federation = SmallFederation.create(tmp_path_factory.mktemp("publishing") / "federation")
    federation.coordinator_key.save(federation.root / "coordinator" / "key.pem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
        for nonce in "12":
            federation.run_in_process(federation.job(with_privacy(rounds=1), nonce=nonce))
    return federation


def publish(federation, to, *, cache, wish=NEWEST):
    folder, rng = CoordinatorFolder(root=federation.root), np.random.default_rng()
    return publish_bundle(folder, wish, to=to, cache=cache, now=federation.clock(), rng=rng)


def bundles_in_ledger(federation):
    entries = read_ledger(federation.coordinator_ledger, key=federation.roster.coordinator)
    return [entry.body.bundle for entry in entries if isinstance(entry.body, Released) and entry.body.bundle]


@pytest.fixture(scope="module")
def bundle(federation, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "bundle"
    publish(federation, folder, cache=cache)
    return folder


def test_a_bundle_opens_agrees_and_is_in_the_ledger_which_still_verifies(federation, bundle, cache):
    opened = open_bundle(bundle, signed_by=federation.roster.coordinator)
    assert require_receipts(opened, federation.roster) == ()
    rng = np.random.default_rng()
    assert require_equal(opened.model, opened.release, cache=cache, rng=rng) <= 1e-6 < MAX_DIFFERENCE
    assert opened.digest in bundles_in_ledger(federation)
    proof = verify_federation(federation.root, roster=federation.roster)
    job = proof.jobs[opened.release.release.job.digest]
    assert job.release.digest == opened.index.release
    assert {path.name for path in bundle.iterdir()} == {
        "release.json", "weights.safetensors", "model.onnx", "card.html", "receipts", "index.json",
    }  # fmt: skip


def test_the_second_release_follows_the_first(federation, bundle):
    first, second = registry(federation.root, coordinator=federation.roster.coordinator)
    assert (first.previous, second.previous) == ("", first.digest)
    assert lineage((first, second), second) == (first,)
    assert open_bundle(bundle, signed_by=federation.roster.coordinator).index.previous == first.digest
    assert first.digest[:4] in (bundle / CARD).read_text(encoding="utf-8")
    assert release_of((first, second), "") == second
    assert release_of((first, second), first.job[:12]) == release_of((first, second), first.digest[:12]) == first
    with pytest.raises(JobRefused, match="no release of it"):
        release_of((first, second), "not a digest")
    with pytest.raises(JobRefused, match="2 releases begin with that"):
        release_of((first, first), first.job[:8])


def test_the_same_release_again_is_the_same_bundle_and_no_second_entry(federation, bundle, cache, tmp_path):
    before = bundles_in_ledger(federation)
    publish(federation, tmp_path / "again", cache=cache)
    assert (tmp_path / "again" / INDEX).read_bytes() == (bundle / INDEX).read_bytes()
    assert bundles_in_ledger(federation) == before


def test_an_older_release_is_published_by_its_job(federation, cache, tmp_path):
    first, _ = registry(federation.root, coordinator=federation.roster.coordinator)
    wish = Wish(job=first.job[:16], licence="for members of the federation", partial=False)
    done = publish(federation, tmp_path / "first", cache=cache, wish=wish)
    assert done.release.digest == first.digest
    assert "for members of the federation" in (tmp_path / "first" / CARD).read_text(encoding="utf-8")
    after, _ = registry(federation.root, coordinator=federation.roster.coordinator)
    assert after.bundles == (done.bundle,)


def test_a_photo_is_graded_by_a_bundle_as_by_its_release(federation, bundle, cache):
    photo = federation.folder(NAMES[0]) / "photos" / "0000-0.png"
    _, second = registry(federation.root, coordinator=federation.roster.coordinator)
    release = federation.root / "jobs" / second.job[:16] / "release"
    graded = [
        grade_photos([photo], release=folder, roster=federation.roster, cache=cache) for folder in (bundle, release)
    ]
    assert graded[0] == graded[1]
    assert graded[0][0].grade in SCALE.labels


def swapped(federation, bundle, to, model):
    """The bundle as its own coordinator would sign it with another ONNX file."""
    opened = open_bundle(bundle, signed_by=federation.roster.coordinator)
    contents = {name: (bundle / name).read_bytes() for name in opened.index.files} | {ONNX: model}
    files = {name: BundledFile.of(content) for name, content in contents.items()}
    index = type(opened.index)(**{**vars(opened.index), "files": files})
    write_bundle(contents, index=index, folder=to, key=federation.coordinator_key, record=lambda _: None)
    return open_bundle(to, signed_by=federation.roster.coordinator)


def test_a_swapped_onnx_file_is_found_out_even_when_it_is_signed(federation, bundle, cache, tmp_path):
    first, _ = registry(federation.root, coordinator=federation.roster.coordinator)
    older = verify_federation(federation.root).jobs[first.job].release
    opened = swapped(federation, bundle, tmp_path / "swapped", portable_release(older, cache=cache))
    with pytest.raises(ModelRefused, match="differs by"):
        require_equal(opened.model, opened.release, cache=cache, rng=np.random.default_rng())


def bent(raw, name, change):
    model = onnx.load_model_from_string(raw)
    (node,) = [node for node in model.graph.node if name in node.output]
    change(node)
    return model.SerializeToString()


def test_an_onnx_file_that_lies_about_costs_or_grades_alone_is_found_out(bundle, federation, cache):
    opened = open_bundle(bundle, signed_by=federation.roster.coordinator)
    worst = bent(opened.model, "grade", lambda node: setattr(node, "op_type", "ArgMax"))
    with pytest.raises(ModelRefused, match="ArgMax"):
        require_equal(worst, opened.release, cache=cache, rng=np.random.default_rng())

    def from_probabilities(node):
        node.input[0] = "probabilities"

    for output, said in (("grade", "another grade"), ("expected_costs", "differs by")):
        lying = bent(opened.model, output, from_probabilities)
        with pytest.raises(ModelRefused, match=said):
            require_equal(lying, opened.release, cache=cache, rng=np.random.default_rng())


def test_nothing_is_published_from_a_folder_that_does_not_verify(federation, cache, tmp_path):
    kept = federation.ledger(NAMES[1]).read_bytes()
    federation.ledger(NAMES[1]).write_bytes(kept[:200] + bytes([kept[200] ^ 1]) + kept[201:])
    try:
        with pytest.raises(LedgerBroken, match="entry 0"):
            publish(federation, tmp_path / "bundle", cache=cache)
    finally:
        federation.ledger(NAMES[1]).write_bytes(kept)
    assert list(tmp_path.iterdir()) == []


def test_absent_ledgers_must_be_allowed_and_stand_on_the_card(federation, cache, tmp_path):
    ledger = federation.ledger(NAMES[2])
    ledger.rename(ledger.with_suffix(".away"))
    try:
        with pytest.raises(LedgerBroken, match=f"no ledger of {NAMES[2]}; add the copies, or give --partial"):
            publish(federation, tmp_path / "bundle", cache=cache)
        assert list(tmp_path.iterdir()) == []
        publish(federation, tmp_path / "bundle", cache=cache, wish=Wish(job="", licence="", partial=True))
    finally:
        ledger.with_suffix(".away").rename(ledger)
    card = (tmp_path / "bundle" / CARD).read_text(encoding="utf-8")
    assert f"<strong>Not in these figures:</strong> {NAMES[2]}" in card


def test_a_coordinator_without_any_partners_ledger_is_told_what_to_ask_for(federation, cache, tmp_path):
    sites = federation.root / "sites"
    sites.rename(tmp_path / "away")
    try:
        with pytest.raises(LedgerBroken, match="ask partners for copies"):
            publish(federation, tmp_path / "bundle", cache=cache, wish=Wish(job="", licence="", partial=True))
    finally:
        (tmp_path / "away").rename(sites)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("older", "said"),
    [
        (
            NAMES,
            "no site's ledger admits it; if these are copies from before that job, ask the partners for newer ones",
        ),
        (NAMES[:1], f"ask {NAMES[0]} for a newer one, unless that ledger was rolled back or forked"),
    ],
)
def test_copies_of_ledgers_from_before_the_job_are_told_to_be_old(federation, cache, tmp_path, older, said):
    whole, newest = {}, registry(federation.root, coordinator=federation.roster.coordinator)[-1]
    for site in older:
        path = federation.root / "sites" / site / "ledger.jsonl"
        entries = read_ledger(path, key=federation.roster.sites[site])
        began = next(i for i, entry in enumerate(entries) if getattr(entry.body, "job", "") == newest.job)
        whole[path] = path.read_bytes()
        path.write_bytes(b"".join(whole[path].splitlines(keepends=True)[:began]))
    try:
        with pytest.raises(LedgerBroken) as refused:
            publish(federation, tmp_path / "bundle", cache=cache)
    finally:
        for path, raw in whole.items():
            path.write_bytes(raw)
    assert said in str(refused.value)
    assert not (tmp_path / "bundle").exists()


def test_while_a_run_holds_the_ledger_nothing_is_published(federation, cache, tmp_path):
    wish = Wish(job="", licence="another card, so that an entry is needed", partial=False)
    with federation.log(), pytest.raises(LedgerUnavailable):
        publish(federation, tmp_path / "bundle", cache=cache, wish=wish)
    assert list(tmp_path.iterdir()) == []


def test_another_key_than_the_rosters_coordinator_publishes_nothing(federation, cache, tmp_path):
    path = federation.root / "coordinator" / "key.pem"
    path.rename(path.with_suffix(".kept"))
    SigningKey.generate().save(path)
    try:
        with pytest.raises(SignatureRefused, match="is not the key that"):
            publish(federation, tmp_path / "bundle", cache=cache)
    finally:
        path.with_suffix(".kept").replace(path)


@pytest.mark.parametrize("licence", ["two\nlines", "x" * 201])
def test_a_licence_is_one_line(federation, cache, tmp_path, licence):
    with pytest.raises(DocumentRefused, match="licence"):
        publish(federation, tmp_path / "bundle", cache=cache, wish=Wish(job="", licence=licence, partial=False))


def test_a_licence_that_looks_like_a_page_stays_text(federation, cache, tmp_path):
    wish = Wish(job="", licence="<script>alert(1)</script>", partial=False)
    publish(federation, tmp_path / "bundle", cache=cache, wish=wish)
    card = (tmp_path / "bundle" / CARD).read_text(encoding="utf-8")
    assert "<script" not in card
    assert "&lt;script&gt;" in card


def said(*arguments):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_three_commands_say_what_was_done_and_what_holds(federation, cache, tmp_path):
    to, roster = tmp_path / "bundle", federation.root / "roster.json"
    published = said("publish", federation.root, "--to", to, "--cache", cache, "--licence", "ours")
    assert "ONNX and release differ by at most" in published
    listed = said("releases", federation.root, "--roster", roster)
    assert listed.count("square") == 2
    held = said("verify-release", to, "--roster", roster, "--cache", cache)
    assert "model.onnx gives the release's own probabilities" in held
    assert f"{3 * len(NAMES)} receipts of {len(NAMES)} sites" in held


def test_a_cache_for_the_backbone_is_made_where_there_is_none(federation, tmp_path, monkeypatch):
    made = tmp_path / "runs" / "cache" / "backbones"
    arguments = list(map(str, ("publish", federation.root, "--to", tmp_path / "bundle", "--cache", made)))

    # The real one takes half a minute to export.
    monkeypatch.setattr("fedgrade.model.backbones.export", lambda _spec, _backbone: small_backbone())
    published = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert published.exit_code == 0, published.output
    assert [path.suffix for path in made.iterdir()] == [".onnx"]


def test_a_cache_that_cannot_be_made_is_named_with_its_option(federation, tmp_path):
    (tmp_path / "runs").write_text("a file in its way")
    refused = CliRunner().invoke(
        cli,
        list(
            map(str, ("publish", federation.root, "--to", tmp_path / "bundle", "--cache", tmp_path / "runs" / "cache"))
        ),
    )
    assert refused.exit_code == 2
    assert "--cache" in refused.output
    assert not (tmp_path / "bundle").exists()


def test_a_verifier_is_told_whose_receipts_it_could_not_check(federation, bundle, cache, tmp_path):
    shorter = Roster(coordinator=federation.roster.coordinator, sites={NAMES[0]: federation.roster.sites[NAMES[0]]})
    path = tmp_path / "roster.json"
    whole = json.loads((federation.root / "roster.json").read_bytes())
    path.write_text(json.dumps({**whole, "sites": {name: whole["sites"][name] for name in shorter.sites}}))
    held = said("verify-release", bundle, "--roster", path, "--cache", cache)
    assert f"signatures were not checked: {NAMES[1]}, {NAMES[2]}" in held


def test_a_machine_without_onnxruntime_checks_the_rest_and_says_what_it_could_not(federation, bundle, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    command = [Path(sys.executable).parent / "fedgrade", "verify-release", bundle, "--roster"]
    held = subprocess.run(
        [*command, federation.root / "roster.json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        check=False,
    )
    assert held.returncode == 0, held.stderr
    assert "model.onnx was not run: onnx" in held.stdout
    assert "each is the one that was signed for" in held.stdout


def test_a_release_in_the_ledger_that_is_not_the_one_in_the_folder_is_named(federation, tmp_path):
    first, second = registry(federation.root, coordinator=federation.roster.coordinator)
    places = [federation.root / "jobs" / one.job[:16] / "release" for one in (first, second)]
    away = tmp_path / "away"
    places[0].rename(away)
    places[1].rename(places[0])
    try:
        with pytest.raises(LedgerBroken, match="is not the one that the coordinator's ledger says"):
            registry(federation.root, coordinator=federation.roster.coordinator)
    finally:
        places[0].rename(places[1])
        away.rename(places[0])


def test_a_run_that_was_resumed_after_its_end_has_one_release_in_the_registry(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
    federation = SmallFederation.create(tmp_path / "federation")
    federation.coordinator_key.save(federation.root / "coordinator" / "key.pem")
    job = federation.job(with_privacy(rounds=1))
    federation.run_in_process(job)
    newest = federation.run_in_process(job)
    (only,) = registry(federation.root, coordinator=federation.roster.coordinator)
    assert only.digest == newest.digest
    assert publish(federation, tmp_path / "bundle", cache=cache).release == only
