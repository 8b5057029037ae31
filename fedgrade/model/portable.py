"""A whole model as one ONNX file: network inputs in; probabilities, expected costs and the cheapest grade out.

The only file that knows the package onnx. The head is the one of :mod:`fedgrade.model.head`, in double precision and
out of plain ONNX operators, so that whoever runs the file needs neither fedgrade nor torch. Nothing of the machine that
made it is left in it: an exporter writes the paths of source files beside each operator.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from fedgrade.errors import ModelRefused
from fedgrade.grading import GradeScale
from fedgrade.model.adapter import Adapter
from fedgrade.model.backbones import MAX_FILE_BYTES
from fedgrade.model.head import BIAS_FEATURE
from fedgrade.model.preprocessing import CHANNELS

FloatArray = npt.NDArray[np.float64]

PHOTOS, FEATURES = "photos", "features"
PROBABILITIES, COSTS, GRADE = "probabilities", "expected_costs", "grade"
OUTPUTS = (PROBABILITIES, COSTS, GRADE)

# All that such files are made of: arithmetic on arrays. No loops, no conditions, no operators of anyone's own.
OPERATORS = (
    "Abs", "Add", "ArgMin", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Div", "Gather", "Greater",
    "InstanceNormalization", "IsInf", "IsNaN", "MatMul", "MaxPool", "Min", "Mul", "Not", "Or", "Pad", "Pow",
    "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Shape", "Sigmoid", "Sqrt", "Sub", "Where",
)  # fmt: skip
_OPAQUE = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS, onnx.AttributeProto.SPARSE_TENSOR)
_COLUMNS = 1


@dataclass(frozen=True, kw_only=True)
class OrdinalHead:
    """What comes after the features.

    Attributes:
        scale: the grades and what mistakes cost.
        thresholds: [grades - 1, dimensions + 1].
        centre: [dimensions].
        adapter: the bottleneck below the thresholds, or none.
    """

    scale: GradeScale
    thresholds: FloatArray
    centre: FloatArray
    adapter: Adapter | None


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """Operators in the order in which they run; each adds one array and gives back its name."""

    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float64) -> str:
        name = f"head/constant {len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: int) -> str:
        name = name or f"head/{operator} {len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"make {name}", **attributes))
        return name

    def of_each_row(self, operator: str, rows: str) -> str:
        """``operator`` along each of ``rows`` [photos, dimensions]: [photos, 1]."""
        return self.add(operator, rows, self.constant([_COLUMNS], np.int64), keepdims=1)


def whole_model(network: bytes, head: OrdinalHead, *, notes: Mapping[str, str]) -> bytes:
    """The ONNX file that does what ``network``, from photos to features, and then ``head`` do.

    Inputs: ``photos`` [photos, 3, input, input], float32, from :func:`fedgrade.model.preprocessing.prepare`.
    Outputs: ``probabilities`` and ``expected_costs`` [photos, grades], float32, best grade first; ``grade`` [photos],
    int64, the position of the cheapest grade, the worse of two that cost the same. ``notes`` are its metadata, with
    the grades' labels beside them.

    Guarantee: probabilities are not negative and sum to 1, also where features are zero or not finite.

    Raises:
        ModelRefused: ``network`` is no such file.
    """
    below = _parsed(network)
    dimensions, grades = head.centre.size, head.scale.grades
    outputs = [
        helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, [PHOTOS, grades]),
        helper.make_tensor_value_info(COSTS, TensorProto.FLOAT, [PHOTOS, grades]),
        helper.make_tensor_value_info(GRADE, TensorProto.INT64, [PHOTOS]),
    ]
    given = [helper.make_tensor_value_info(f"head/{FEATURES}", TensorProto.FLOAT, [PHOTOS, dimensions])]
    graph = _head_graph(head)
    above = helper.make_model(
        helper.make_graph(graph.nodes, "head", given, outputs, initializer=graph.constants),
        ir_version=below.ir_version,
        opset_imports=below.opset_import,
    )
    merged = compose.merge_models(_bare(below), above, io_map=[(FEATURES, f"head/{FEATURES}")])
    merged.producer_name, merged.producer_version = "fedgrade", ""
    merged.graph.name, merged.graph.doc_string, merged.doc_string = "fedgrade", "", ""
    labels = {"grades": json.dumps(head.scale.labels), "critical": json.dumps(head.scale.critical)}
    helper.set_model_props(merged, {**notes, **labels})
    raw: bytes = merged.SerializeToString(deterministic=True)
    require_plain(raw)
    return raw


def require_plain(raw: bytes) -> None:
    """Return if ``raw`` is an ONNX file of nothing but arithmetic, all of it inside, with our inputs and outputs.

    Raises:
        ModelRefused: it is none, or names a file outside, an unknown operator, other inputs or outputs.
    """
    model = _parsed(raw)
    names = tuple(value.name for value in model.graph.input), tuple(value.name for value in model.graph.output)
    if names != ((PHOTOS,), OUTPUTS):
        raise ModelRefused(f"ONNX: inputs and outputs are {str(names)[:200]}; {((PHOTOS,), OUTPUTS)} are expected")
    shape = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    if shape[1:2] != [CHANNELS]:
        raise ModelRefused(f"ONNX: photos of shape {shape}; {CHANNELS} channels come second")
    if model.functions or model.training_info or model.graph.sparse_initializer:
        raise ModelRefused("ONNX: functions, training or sparse arrays are in it; only operators are expected")
    if outside := [tensor for tensor in model.graph.initializer if tensor.external_data or tensor.data_location]:
        raise ModelRefused(f"ONNX: array {outside[0].name[:80]!r} lies in another file; all must be inside")
    for node in model.graph.node:
        if node.domain not in {"", "ai.onnx"} or node.op_type not in OPERATORS:
            raise ModelRefused(f"ONNX: operator {node.domain[:40]}.{node.op_type[:40]} is not one of {len(OPERATORS)}")
        if opaque := [attribute for attribute in node.attribute if attribute.type in _OPAQUE]:
            raise ModelRefused(f"ONNX: attribute {opaque[0].name[:80]!r} of {node.op_type} is not a plain value")


def _head_graph(head: OrdinalHead) -> _Graph:
    """:func:`fedgrade.model.head.grade_probabilities` of :func:`fedgrade.model.head.head_inputs`, step by step."""
    graph = _Graph()
    inputs = _inputs(graph, head.centre)
    if head.adapter is not None:
        hidden = graph.add("Relu", graph.add("MatMul", inputs, graph.constant(head.adapter.down.T)))
        inputs = graph.add("Add", inputs, graph.add("MatMul", hidden, graph.constant(head.adapter.up.T)))
    products = graph.add("MatMul", inputs, graph.constant(head.thresholds[:, :-1].T))
    scores = graph.add("Add", products, graph.constant(BIAS_FEATURE * head.thresholds[:, -1]))
    probabilities = _differences(graph, graph.add("Sigmoid", scores), len(head.thresholds))
    costs = graph.add("MatMul", probabilities, graph.constant(head.scale.cost_matrix))
    graph.add("Cast", probabilities, name=PROBABILITIES, to=TensorProto.FLOAT)
    graph.add("Cast", costs, name=COSTS, to=TensorProto.FLOAT)
    # The last of equals is the worse grade, the safer mistake.
    graph.add("ArgMin", costs, name=GRADE, axis=_COLUMNS, keepdims=0, select_last_index=1)
    return graph


def _inputs(graph: _Graph, centre: FloatArray) -> str:
    """What the thresholds see of the features, without the bias feature: zero where they are not usable."""
    features, zero = f"head/{FEATURES}", graph.constant(0.0)
    strange = graph.add("Or", graph.add("IsNaN", features), graph.add("IsInf", features))
    # Counted, not taken from a maximum: what that makes of a NaN is each runtime's own affair.
    found = graph.of_each_row("ReduceMax", graph.add("Cast", strange, to=TensorProto.FLOAT))
    whole = graph.add("Not", graph.add("Cast", found, to=TensorProto.BOOL))
    rows = graph.add("Where", whole, graph.add("Cast", features, to=TensorProto.DOUBLE), zero)
    units, usable = _units(graph, rows, zero)
    moved = graph.add("Where", usable, graph.add("Sub", units, graph.constant(centre)), zero)
    return _units(graph, moved, zero)[0]


def _units(graph: _Graph, rows: str, zero: str) -> tuple[str, str]:
    """Finite ``rows`` scaled to length 1, and which of them [photos, 1] are not zero; zeros stay."""
    one = graph.constant(1.0)
    largest = graph.of_each_row("ReduceMax", graph.add("Abs", rows))
    usable = graph.add("Greater", largest, zero)
    scaled = graph.add("Div", rows, graph.add("Where", usable, largest, one))
    lengths = graph.add("Sqrt", graph.of_each_row("ReduceSum", graph.add("Mul", scaled, scaled)))
    return graph.add("Div", scaled, graph.add("Where", usable, lengths, one)), usable


def _differences(graph: _Graph, exceedances: str, thresholds: int) -> str:
    """Probabilities [photos, grades] of ``exceedances`` [photos, grades - 1], made to fall by a running minimum."""
    columns = [
        graph.add("Gather", exceedances, graph.constant([number], np.int64), axis=_COLUMNS)
        for number in range(thresholds)
    ]
    falling = list(accumulate(columns, lambda least, column: graph.add("Min", least, column)))
    side_by_side = graph.add("Concat", *falling, axis=_COLUMNS)
    above = graph.add("Pad", side_by_side, graph.constant([0, 1, 0, 0], np.int64), graph.constant(1.0))
    below = graph.add("Pad", side_by_side, graph.constant([0, 0, 0, 1], np.int64), graph.constant(0.0))
    return graph.add("Sub", above, below)


def _parsed(raw: bytes) -> Any:
    if len(raw) > MAX_FILE_BYTES:
        raise ModelRefused(f"ONNX: {len(raw)} bytes; the limit is {MAX_FILE_BYTES}")
    try:
        return onnx.load_model_from_string(raw)
    except Exception as error:  # protobuf's own class, from a package that is nobody's dependency here
        raise ModelRefused("ONNX: the bytes are no such file") from error


def _bare(model: Any) -> Any:
    """``model`` without the exporter's notes, which quote source files and where they lie."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model
