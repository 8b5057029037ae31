import json
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fedgrade.errors import DocumentRefused, FedgradeError
from fedgrade.privacy.plan import LocalSpec
from fedgrade.trust.canonical import MAX_DEPTH, MAX_DOCUMENT_BYTES, decode, decode_yaml, digest, encode


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: Literal["circle"] = "circle"
    radius: float


@dataclass(frozen=True, kw_only=True)
class Square:
    kind: Literal["square"] = "square"
    side: Fraction


@dataclass(frozen=True, kw_only=True)
class Drawing:
    title: str
    shapes: tuple[Annotated[Circle | Square, Field(discriminator="kind")], ...]
    seal: bytes
    copies: int
    prices: dict[str, Fraction]
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Single:
    count: int = 0
    weight: float = 0.0
    part: Fraction = Fraction(1)
    word: str = ""
    truth: bool = False
    row: tuple[int, ...] = ()


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
shapes = st.builds(Circle, radius=finite) | st.builds(Square, side=st.fractions())
drawings = st.builds(
    Drawing,
    title=text,
    shapes=st.lists(shapes, max_size=4).map(tuple),
    seal=st.binary(max_size=40),
    copies=st.integers(),
    prices=st.dictionaries(text, st.fractions(), max_size=3),
    note=st.none() | text,
)
json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
)


@given(drawings)
def test_decoding_gives_back_what_was_encoded(drawing):
    assert decode(Drawing, encode(drawing)) == drawing


@given(drawings)
def test_there_is_one_encoding_of_a_value(drawing):
    raw = encode(drawing)
    assert encode(decode(Drawing, raw)) == raw
    assert json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() == raw


@given(st.binary(max_size=200) | json_trees.map(lambda tree: json.dumps(tree).encode()))
def test_any_bytes_are_a_value_or_one_line_of_refusal(raw):
    for door in (decode, decode_yaml):
        refusals = []
        try:
            assert isinstance(door(Single, raw), Single)
        except FedgradeError as error:
            refusals.append(str(error))
        assert all("\n" not in refusal and len(refusal) < 500 for refusal in refusals)


def test_equal_values_have_equal_digests_even_if_one_was_written_with_whole_numbers():
    spec = {"delta": 1e-5, "centre_share": 0.1, "rounds": 5, "evaluation_epsilon": 1.0, "max_grad_norm": 1.0}
    assert encode(LocalSpec(target_epsilon=2, **spec)) == encode(LocalSpec(target_epsilon=2.0, **spec))


def test_the_canonical_form_by_hand():
    drawing = Drawing(
        title="é",
        shapes=(Square(side=Fraction(2, 6)),),
        seal=b"\xff\x00",
        copies=3,
        prices={"b": Fraction(2)},
        note=None,
    )
    assert encode(drawing).decode() == (
        '{"copies":3,"note":null,"prices":{"b":"2"},"seal":"_wA=","shapes":[{"kind":"square","side":"1/3"}],"title":"é"}'
    )
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ('{"count": "1"}', "count: "),
        ('{"count": true}', "count: "),
        ('{"count": 1.0}', "count: "),
        ('{"count": 1e2}', "count: "),
        ('{"count": null}', "count: "),
        ('{"weight": true}', "weight: "),
        ('{"weight": "1"}', "weight: "),
        ('{"weight": 1e999}', "weight: "),
        ('{"word": 1}', "word: "),
        ('{"truth": 1}', "truth: "),
        ('{"truth": "true"}', "truth: "),
        ('{"row": [1, "2"]}', "row.1: "),
        ('{"row": {}}', "row: "),
        ('{"part": "1/0"}', "part: "),
        ('{"part": "nan"}', "part: "),
        ('{"part": 1e999}', "part: "),
        ('{"part": "1e3000000000"}', "part: "),
        ('{"part": true}', "part: "),
        ('{"colour": 1}', "colour: unknown key"),
        ('{"count": 1, "count": 1}', "'count' appears twice"),
        ('{"row": [{"a": 1, "a": 2}]}', "'a' appears twice"),
        ('{"weight": NaN}', "NaN is not a number"),
        ('{"weight": -Infinity}', "-Infinity is not a number"),
        ('{"count": %s}' % ("9" * 5000), "not strict JSON"),
        ("[]", "a JSON object is expected, found list"),
        ("null", "found NoneType"),
        ("", "not strict JSON"),
        ("{}{}", "not strict JSON"),
        ('{},{"count":1}', "not strict JSON"),
        ('{"count": 01}', "not strict JSON"),
        ("{'count': 1}", "not strict JSON"),
        ('{"count": 1,}', "not strict JSON"),
        ('{"count": 1} // why', "not strict JSON"),
        ('{"word": "\\ud800"}', "Invalid JSON"),
        ('{"word": "\x00"}', "not strict JSON"),
        ("\ufeff{}", "Invalid JSON"),
    ],
)
def test_a_document_that_is_not_quite_right_is_refused_in_one_line_that_says_where(raw, fault):
    with pytest.raises(DocumentRefused) as refusal:
        decode(Single, raw.encode(), what="thing")
    assert str(refusal.value).startswith("thing: ")
    assert fault in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "raw",
    [b'{"word":"\xff"}', b'{"word":"\xed\xa0\x80"}', '{"count":1}'.encode("utf-16"), '{"count":1}'.encode("utf-32")],
)
def test_bytes_that_are_not_utf_8_are_refused(raw):
    with pytest.raises(DocumentRefused):
        decode(Single, raw)


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ('{"kind":"circle","radius":"1"}', r"shapes\.0\.circle\.radius: "),
        ('{"kind":"circle","radius":1,"side":"1"}', r"shapes\.0\.circle\.side: unknown key"),
        ('{"kind":"hexagon"}', r"shapes\.0: .*'circle', 'square'"),
        ("{}", r"shapes\.0: .*'kind'"),
        ("7", r"shapes\.0: "),
    ],
)
def test_a_fault_inside_a_union_is_named_by_its_path(raw, fault):
    document = f'{{"title":"","shapes":[{raw}],"seal":"","copies":1,"prices":{{}}}}'
    with pytest.raises(DocumentRefused, match=fault):
        decode(Drawing, document.encode())


def test_a_missing_field_is_named():
    with pytest.raises(DocumentRefused, match=r"Circle: radius: "):
        decode(Circle, b"{}")


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 300, 600, 900, 100_000])
def test_nesting_bombs_are_refused_whatever_their_depth(depth):
    with pytest.raises(DocumentRefused):
        decode(Single, b'{"row":' + b"[" * depth + b"]" * depth + b"}")
    with pytest.raises(DocumentRefused):
        decode(Single, b'{"row":' * depth + b"1" + b"}" * depth)


def test_the_depth_limit_is_where_it_says():
    @dataclass(frozen=True, kw_only=True)
    class Anything:
        tree: object

    def nested(depth):
        return b'{"tree":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    decode(Anything, nested(MAX_DEPTH))
    with pytest.raises(DocumentRefused, match=f"deeper than {MAX_DEPTH}"):
        decode(Anything, nested(MAX_DEPTH + 1))


def test_a_document_with_a_million_repeated_keys_is_refused_without_comparing_each_with_each():
    keys = b",".join(b'"%d":0' % key for key in range(200_000))
    with pytest.raises(DocumentRefused, match="'199999' appears twice"):
        decode(Single, b"{" + keys + b',"199999":0}')


def test_an_oversized_document_is_refused_before_it_is_parsed():
    with pytest.raises(DocumentRefused, match=f"{MAX_DOCUMENT_BYTES + 1} bytes; the limit is {MAX_DOCUMENT_BYTES}"):
        decode(Single, b"[" * (MAX_DOCUMENT_BYTES + 1))
    with pytest.raises(DocumentRefused, match="12 bytes; the limit is 11"):
        decode_yaml(Single, b'{"count": 1}', limit=11)


@given(st.integers(-(10**4000), 10**4000))
def test_whole_numbers_of_any_size_survive(number):
    assert decode(Single, encode(Single(count=number))).count == number


def test_half_a_surrogate_pair_is_refused_on_the_way_out_too():
    with pytest.raises(DocumentRefused, match=r"Single: '\\ud800' is not text"):
        encode(Single(word="\ud800"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_never_becomes_a_document(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(Single(weight=value))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("weight: 1e-5", Single(weight=1e-5)),
        ("weight: 1E5", Single(weight=1e5)),
        ("weight: -1.5e+5", Single(weight=-1.5e5)),
        ("weight: .5", Single(weight=0.5)),
        ("weight: 2", Single(weight=2.0)),
        ("count: -7", Single(count=-7)),
        ("count: 0", Single(count=0)),
        ("part: 1/3", Single(part=Fraction(1, 3))),
        ("part: 0.1", Single(part=Fraction(1, 10))),
        ("word: no", Single(word="no")),
        ("word: 2026-01-01", Single(word="2026-01-01")),
        ("word: 1:30", Single(word="1:30")),
        ("word: 'true'", Single(word="true")),
        ("truth: true", Single(truth=True)),
        ("row: [1, 2]", Single(row=(1, 2))),
        ("row:\n  - 1\n  - 2  # two", Single(row=(1, 2))),
        ("{}", Single()),
    ],
)
def test_yaml_means_what_a_person_means(written, value):
    assert decode_yaml(Single, written.encode()) == value


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ("count: 010", "count: "),
        ("count: 0x10", "count: "),
        ("count: 1_000", "count: "),
        ("count: 1:30", "count: "),
        ("count: 1.0", "count: "),
        ("truth: yes", "truth: "),
        ("weight: .inf", "weight: "),
        ("weight: .nan", "weight: "),
        ("weight: 1e999", "not plain YAML"),
        ("word: ~", "word: "),
        ("word: 5", "word: "),
        ("colour: red", "colour: unknown key"),
        ("count: 1\ncount: 2", "'count' appears twice"),
        ("count: &a 1\nweight: *a", "&a"),
        ("count: *a", r"aliases \(\*name\)"),
        ("<<: {count: 1}", "<<: unknown key"),
        ("count: !!int '3'", "tag"),
        ("!!python/object/apply:os.system [ls]", "tag"),
        ("word: !secret x", "tag"),
        ("1: 2", "key 1 must be text"),
        ("? [1]\n: 2", "must be text"),
        ("count: 1\n---\ncount: 2", "single document"),
        ("count: [", "not plain YAML"),
        ("word: \x07", "not plain YAML"),
        ("- 1", "a JSON object is expected"),
        ("", "a JSON object is expected"),
        ("row: " + "[" * 3000, "not plain YAML"),
    ],
)
def test_yaml_that_could_be_read_in_two_ways_is_refused(written, fault):
    with pytest.raises(DocumentRefused, match=fault) as refusal:
        decode_yaml(Single, written.encode(), what="site.yaml")
    assert str(refusal.value).startswith("site.yaml: ")
    assert "\n" not in str(refusal.value)


def test_yaml_that_is_not_utf_8_is_refused():
    with pytest.raises(DocumentRefused, match="not plain YAML"):
        decode_yaml(Single, b"word: \xff")


@given(drawings)
def test_canonical_json_is_also_yaml_of_the_same_meaning(drawing):
    assert decode_yaml(Drawing, json.dumps(json.loads(encode(drawing))).encode()) == drawing
