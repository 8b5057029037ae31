"""Weights as bytes that can only be numbers: safetensors, read by this file alone, never pickle.

The format is eight bytes of header length, a JSON header, then the raw little-endian numbers
(https://github.com/huggingface/safetensors#format). A reader here always knows beforehand which names, shapes and types
must be there, and refuses everything else before it takes memory for it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedgrade.errors import ModelRefused
from fedgrade.trust.canonical import digest as digest  # noqa: PLC0414 - the one digest of weights, offered here too

Array = npt.NDArray[Any]
Expected = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]

MAX_HEADER_BYTES = 2**20
LENGTH_BYTES = 8
METADATA = "__metadata__"
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}


def write_weights(weights: Mapping[str, Array], *, metadata: Mapping[str, str]) -> bytes:
    """``weights`` as safetensors bytes; equal values and metadata give equal bytes.

    Raises:
        ModelRefused: a name, type or number that :func:`read_weights` would not take back.
    """
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    parts: list[bytes] = []
    end = 0
    for name in sorted(weights):
        code, part = _encoded(name, weights[name])
        header[name] = {"dtype": code, "shape": list(weights[name].shape), "data_offsets": [end, end + len(part)]}
        parts.append(part)
        end += len(part)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    # The numbers start at a multiple of eight, so that they can be mapped into memory as they lie.
    text += b" " * (-len(text) % LENGTH_BYTES)
    _check_header_size(len(text))
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + b"".join(parts)


def read_weights(raw: bytes, *, expected: Expected) -> dict[str, Array]:
    """The arrays of ``raw``, exactly those in ``expected``: name to (shape, type float32, float64 or int64).

    Guarantee: no name is missing or added, no shape or type differs, every number is finite and every byte accounted
    for.

    Raises:
        ModelRefused: anything else; the message names the first entry at fault.
    """
    header, numbers = _split(raw)
    entries = {name: entry for name, entry in header.items() if name != METADATA}
    if entries.keys() != expected.keys():
        wrong = min(entries.keys() ^ expected.keys())
        raise ModelRefused(f"weights: {wrong!r} is {'missing' if wrong in expected else 'not expected'}")
    spans = {name: _span(name, entries[name], *expected[name]) for name in expected}
    _check_gapless(list(spans.values()), len(numbers))
    return {name: _array(name, numbers[start:end], *expected[name]) for name, (start, end) in spans.items()}


def read_metadata(raw: bytes) -> dict[str, str]:
    """The text entries that :func:`write_weights` was given as ``metadata``.

    Raises:
        ModelRefused: the header is not one of safetensors, or its metadata is not text.
    """
    header, _ = _split(raw)
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ModelRefused(f"weights: {METADATA} must map text to text")
    return metadata


def _encoded(name: str, array: Array) -> tuple[str, bytes]:
    little = array.dtype.newbyteorder("<")
    code = next((code for code, dtype in DTYPES.items() if dtype == little), None)
    if code is None or name == METADATA or not name:
        raise ModelRefused(f"weights: {name!r} of type {array.dtype} cannot be written; types are {list(DTYPES)}")
    _check_finite(name, array)
    return code, np.ascontiguousarray(array, dtype=little).tobytes()


def _split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(raw[:LENGTH_BYTES], "little")
    _check_header_size(size)
    if len(raw) < LENGTH_BYTES + size:
        raise ModelRefused(f"weights: cut off, {len(raw)} bytes where the header alone takes {LENGTH_BYTES + size}")
    try:
        header = json.loads(raw[LENGTH_BYTES : LENGTH_BYTES + size], object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"weights: the header is not strict JSON: {str(error)[:120]}") from error
    if not isinstance(header, dict):
        raise ModelRefused(f"weights: the header is a JSON {type(header).__name__}, not an object")
    return header, raw[LENGTH_BYTES + size :]


def _check_header_size(size: int) -> None:
    if not 0 < size <= MAX_HEADER_BYTES:
        raise ModelRefused(f"weights: a header of {size} bytes; 1 to {MAX_HEADER_BYTES} are allowed")


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name appears twice")
    return keys


def _span(name: str, entry: object, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != ENTRY_FIELDS:
        raise ModelRefused(f"weights: {name!r} must have exactly {sorted(ENTRY_FIELDS)}")
    wanted = np.dtype(dtype).newbyteorder("<")
    # Looked up by name, never compared with a missing one: numpy holds None equal to float64.
    codes = [code for code, dtype in DTYPES.items() if dtype == wanted]
    if entry["dtype"] not in codes:
        raise ModelRefused(f"weights: {name!r} is of type {str(entry['dtype'])[:40]}, {wanted.name} is expected")
    if not _are_counts(entry["shape"]) or tuple(entry["shape"]) != tuple(shape):
        raise ModelRefused(f"weights: {name!r} has shape {str(entry['shape'])[:80]}, {list(shape)} is expected")
    offsets = entry["data_offsets"]
    size = math.prod(shape) * wanted.itemsize
    if not _are_counts(offsets) or len(offsets) != len(("start", "end")) or offsets[1] - offsets[0] != size:
        raise ModelRefused(f"weights: {name!r} lies at {str(offsets)[:80]}, a span of {size} bytes is expected")
    return offsets[0], offsets[1]


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_gapless(spans: list[tuple[int, int]], size: int) -> None:
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise ModelRefused(f"weights: bytes {min(start, position)} to {max(start, position)} overlap or hide a gap")
        position = end
    if position != size:
        raise ModelRefused(f"weights: {size} bytes of numbers, the header describes {position}")


def _array(name: str, part: bytes, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    array = np.frombuffer(part, dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype)
    _check_finite(name, array)
    return array


def _check_finite(name: str, array: Array) -> None:
    if not np.isfinite(array).all():
        raise ModelRefused(f"weights: {name!r} holds a number that is not finite")
