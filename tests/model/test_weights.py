import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedgrade.errors import ModelRefused
from fedgrade.model.weights import MAX_HEADER_BYTES, digest, read_metadata, read_weights, write_weights

EXPECTED = {"centre": ((3,), "float64"), "thresholds": ((2, 4), "float64")}


def small():
    return {"thresholds": np.arange(8.0).reshape(2, 4), "centre": np.array([0.5, -1.0, 2.0])}


def framed(header, numbers=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def finite_arrays():
    shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    kinds = st.sampled_from([np.float32, np.float64, np.int64])
    return kinds.flatmap(
        lambda kind: arrays.arrays(
            kind, shapes, elements=None if kind is np.int64 else {"allow_nan": False, "allow_infinity": False}
        )
    )


def names():
    return st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    )


@given(st.dictionaries(names(), finite_arrays(), max_size=4), st.dictionaries(names(), names(), max_size=3))
def test_reading_what_was_written_gives_it_back(weights, metadata):
    raw = write_weights(weights, metadata=metadata)
    expected = {name: (array.shape, array.dtype) for name, array in weights.items()}
    again = read_weights(raw, expected=expected)
    assert again.keys() == weights.keys()
    for name, array in weights.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)
    assert read_metadata(raw) == metadata


def test_the_order_of_the_names_does_not_change_the_bytes():
    weights = small()
    turned = dict(reversed(weights.items()))
    assert write_weights(weights, metadata={"a": "1", "b": "2"}) == write_weights(turned, metadata={"b": "2", "a": "1"})


def test_the_safetensors_library_reads_our_bytes_and_we_read_its():
    weights = small()
    theirs = load(write_weights(weights, metadata={"job": "x"}))
    ours = read_weights(save(weights, metadata={"job": "x"}), expected=EXPECTED)
    for name, array in weights.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name], array)


def test_arrays_that_lie_in_another_order_in_memory_are_written_as_they_read():
    weights = {"turned": np.arange(6.0).reshape(2, 3).T, "big": np.arange(3, dtype=">f8")}
    again = read_weights(write_weights(weights, metadata={}), expected={"turned": ((3, 2), "f8"), "big": ((3,), "f8")})
    np.testing.assert_array_equal(again["turned"], weights["turned"])
    np.testing.assert_array_equal(again["big"], weights["big"])


def test_what_is_read_can_be_written_to_and_leaves_the_bytes_alone():
    raw = write_weights(small(), metadata={})
    before = digest(raw)
    read_weights(raw, expected=EXPECTED)["centre"][0] = 7
    assert digest(raw) == before


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_both_ways(number):
    poisoned = {**small(), "centre": np.array([0.0, number, 1.0])}
    with pytest.raises(ModelRefused, match="'centre' holds a number that is not finite"):
        write_weights(poisoned, metadata={})
    with pytest.raises(ModelRefused, match="'centre' holds a number that is not finite"):
        read_weights(save(poisoned), expected=EXPECTED)


@pytest.mark.parametrize("array", [np.zeros(3, np.float16), np.zeros(3, bool), np.array(["a"]), np.array([None])])
def test_a_type_off_the_list_is_never_written(array):
    with pytest.raises(ModelRefused, match="cannot be written"):
        write_weights({"w": array}, metadata={})


def test_a_missing_an_added_and_a_misshapen_entry_are_named():
    weights = small()
    with pytest.raises(ModelRefused, match="'thresholds' is missing"):
        read_weights(write_weights({"centre": weights["centre"]}, metadata={}), expected=EXPECTED)
    with pytest.raises(ModelRefused, match="'zusatz' is not expected"):
        read_weights(write_weights({**weights, "zusatz": np.zeros(1)}, metadata={}), expected=EXPECTED)
    with pytest.raises(ModelRefused, match=r"'thresholds' has shape \[4, 2\], \[2, 4\] is expected"):
        read_weights(write_weights({**weights, "thresholds": np.zeros((4, 2))}, metadata={}), expected=EXPECTED)
    with pytest.raises(ModelRefused, match="'centre' is of type F32, float64 is expected"):
        read_weights(write_weights({**weights, "centre": np.zeros(3, np.float32)}, metadata={}), expected=EXPECTED)


def entry(**changes):
    return {"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8], **changes}}


HOSTILE = {
    "nothing at all": b"",
    "a header longer than the cap": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" * 100,
    "a header of eighteen exabytes": b"\xff" * 8 + b"{}",
    "a header cut off": framed(entry())[:20],
    "numbers cut off": framed(entry(), b"\0" * 7),
    "bytes after the end": framed(entry(), b"\0" * 9),
    "a header that is no JSON": framed(b"{'w':1}", b"\0" * 8),
    "a header that is no UTF-8": framed(b'{"\xff":1}', b"\0" * 8),
    "a header that is a list": framed([], b""),
    "a name that appears twice": framed(b'{"w":1,"w":1}'),
    "nesting": framed(b'{"w":' + b"[" * 100_000),
    "a number of a million digits": framed(b'{"w":' + b"1" * 900_000 + b"}"),
    "an entry that is a list": framed({"w": []}, b"\0" * 8),
    "a further field": framed(entry(stride=[1]), b"\0" * 8),
    "a type off the list": framed(entry(dtype="U8"), b"\0" * 8),
    "a type that is a list": framed(entry(dtype=["F64"]), b"\0" * 8),
    "a shape of booleans": framed(entry(shape=[True]), b"\0" * 8),
    "a negative shape": framed(entry(shape=[-1]), b"\0" * 8),
    "a shape of fractions": framed(entry(shape=[1.0]), b"\0" * 8),
    "offsets that are too short": framed(entry(data_offsets=[0, 4]), b"\0" * 8),
    "offsets that are negative": framed(entry(data_offsets=[-8, 0]), b"\0" * 8),
    "three offsets": framed(entry(data_offsets=[0, 8, 8]), b"\0" * 8),
    "a gap before the numbers": framed(entry(data_offsets=[8, 16]), b"\0" * 16),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused(raw):
    with pytest.raises(ModelRefused, match=r"^weights: "):
        read_weights(raw, expected={"w": ((1,), "float64")})


def test_two_names_on_the_same_numbers_are_refused():
    header = {**entry(), "v": entry()["w"]}
    with pytest.raises(ModelRefused, match="overlap"):
        read_weights(framed(header, b"\0" * 8), expected={"v": ((1,), "f8"), "w": ((1,), "f8")})


def test_metadata_that_is_not_text_is_refused():
    with pytest.raises(ModelRefused, match="must map text to text"):
        read_metadata(framed({"__metadata__": {"a": 1}}))


@given(st.binary(max_size=64), st.integers(0, 400))
def test_changed_bytes_are_refused_or_still_finite_arrays_of_the_right_shape(change, position):
    raw = write_weights(small(), metadata={"job": "x"})
    changed = raw[:position] + change + raw[position + len(change) :]
    try:
        weights = read_weights(changed, expected=EXPECTED)
    except ModelRefused:
        return
    assert {name: array.shape for name, array in weights.items()} == {"centre": (3,), "thresholds": (2, 4)}
    assert all(np.isfinite(array).all() for array in weights.values())


def test_the_library_would_have_refused_the_overlap_too():
    with pytest.raises(SafetensorError):
        load(framed({**entry(), "v": entry()["w"]}, b"\0" * 8))
