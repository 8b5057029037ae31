"""One strict door for every document: YAML from people, JSON from the wire and from disk.

``decode(T, raw)`` is the only way from bytes to a value. It refuses duplicate keys, unknown fields, wrong types,
infinities, deep nesting and anything over its size cap, with one line that names the field. ``encode(value)`` writes
the one canonical form, so that equal values have equal digests. No class name, path or code ever comes from the bytes.
"""

import hashlib
import json
import re
from collections import Counter
from functools import cache
from typing import Any, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedgrade.errors import DocumentRefused

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 4 * 2**20
MAX_DEPTH = 32

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, ser_json_bytes="base64", val_json_bytes="base64")


def decode(as_: type[T], raw: bytes, *, what: str = "", limit: int = MAX_DOCUMENT_BYTES) -> T:
    """The value of type ``as_`` that the JSON document ``raw`` spells out, and nothing else.

    Args:
        as_: a frozen dataclass; nested ones, tuples, unions and fractions are read strictly.
        raw: UTF-8 JSON, at most ``limit`` bytes.
        what: the document's name for the error message; the type's name by default.
        limit: size cap in bytes, checked before anything is parsed.

    Raises:
        DocumentRefused: the bytes are not such a document; the message names the first field at fault.
        FedgradeError: the fields are well-typed but impossible together, as the type itself says.
    """
    name = what or as_.__name__
    _check_shape(raw, name=name, limit=limit)
    try:
        # A one-element tuple carries the strict configuration into plain dataclasses, which cannot hold one.
        (value,) = cast("tuple[T]", _adapter(cast("Any", as_)).validate_json(b"[" + raw + b"]"))
    except ValidationError as error:
        raise DocumentRefused(f"{name}: {_first_fault(error)}") from error
    return value


def decode_yaml(as_: type[T], raw: bytes, *, what: str = "", limit: int = MAX_DOCUMENT_BYTES) -> T:
    """Like :func:`decode`, for a YAML file written by a person: same types, same strictness, no tags, no aliases.

    Raises:
        DocumentRefused: not plain YAML, or not such a document.
    """
    name = what or as_.__name__
    if len(raw) > limit:
        raise DocumentRefused(f"{name}: {len(raw)} bytes; the limit is {limit}")
    try:
        tree = _PlainLoader(raw).get_single_data()
        plain = json.dumps(tree, allow_nan=False)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise DocumentRefused(f"{name}: not plain YAML: {_one_line(error)}") from error
    return decode(as_, plain.encode(), what=name, limit=limit)


def encode(value: object) -> bytes:
    """The canonical JSON of a frozen dataclass: sorted keys, no spaces, bytes in base64, fractions as ``"a/b"``.

    Guarantee: ``decode(type(value), encode(value)) == value``.

    Raises:
        DocumentRefused: a text holds half a surrogate pair, as file names that are not UTF-8 do; JSON cannot carry it.
    """
    (plain,) = _adapter(cast("Any", type(value))).dump_python((value,), mode="json")
    try:
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DocumentRefused(f"{type(value).__name__}: {error.object[error.start]!a} is not text") from error


def digest(raw: bytes) -> str:
    """SHA-256 of ``raw`` in lower-case hexadecimal (FIPS 180-4)."""
    return hashlib.sha256(raw).hexdigest()


@cache
def _adapter(as_: Any) -> TypeAdapter[Any]:
    single: Any = tuple.__class_getitem__((as_,))
    return TypeAdapter(single, config=_STRICT)


def _check_shape(raw: bytes, *, name: str, limit: int) -> None:
    if len(raw) > limit:
        raise DocumentRefused(f"{name}: {len(raw)} bytes; the limit is {limit}")
    try:
        # A byte order mark is dropped here, and refused by the parser that makes the value.
        tree = _STRICT_JSON.decode(raw.decode().removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DocumentRefused(f"{name}: not strict JSON: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise DocumentRefused(f"{name}: a JSON object is expected, found {type(tree).__name__}")
    # Every level opens with a bracket; brackets inside texts only make this count larger, and the walk more frequent.
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        _check_depth(tree, name=name)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        # One pass: these bytes may come from anyone, and counting each key anew would take hours on a few megabytes.
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r} appears twice")
    return keys


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number here")


_STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _check_depth(tree: Any, *, name: str) -> None:
    containers = [tree]
    # Level by level, not by recursion: the document must not choose how deep our own stack grows.
    for _ in range(MAX_DEPTH):
        branches = [branch for node in containers for branch in (node.values() if isinstance(node, dict) else node)]
        containers = [branch for branch in branches if isinstance(branch, dict | list)]
        if not containers:
            return
    raise DocumentRefused(f"{name}: nested deeper than {MAX_DEPTH}")


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    # Parts of the path may be the document's own keys: no line breaks or escape sequences reach the terminal.
    path = ".".join(str(part) if str(part).isprintable() else repr(part) for part in fault["loc"][1:])[:240]
    message = fault["msg"]
    if fault["type"] == "unexpected_keyword_argument":
        message = "unknown key"
    shown = _one_line(repr(fault["input"]))
    return f"{path}: {message} (found {shown[:80]})" if path else f"{message} (found {shown[:80]})"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:240]


class _PlainLoader(yaml.SafeLoader):
    """YAML as JSON could have said it: no tags, anchors or aliases (bombs), no duplicate keys, text keys only.

    Unquoted words mean what JSON means: ``true`` is a truth, ``no`` a word; ``10`` a number, ``010`` and ``1:30`` text.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = cast("Any", self).peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        if event.anchor is not None:
            raise yaml.YAMLError(f"anchor &{event.anchor} is not allowed")
        if event.tag is not None:
            raise yaml.YAMLError(f"tag {event.tag!r} is not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - PyYAML's signature
        seen: set[str] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, str):
                raise yaml.YAMLError(f"key {key!r} must be text")
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} appears twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 would read 010 as 8, 1:30 as 90, no as false, 2026-01-01 as a date, and 1e-5 as text for want of a dot. Here
# plain words are JSON's numbers (a leading + or dot forgiven), true, false and null; everything else is text.
_PLAIN_WORDS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"^(?:true|false)$", "tf"),
    ("null", r"^(?:null|~|)$", "n~"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
)
_PlainLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _PLAIN_WORDS:
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), [*_first])
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])
