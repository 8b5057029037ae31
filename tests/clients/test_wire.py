import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from clients.wire import unwrap, wrap
from fedgrade.errors import MessageRefused
from fedgrade.federation.pieces import PIECE_BYTES


@given(st.binary(max_size=2000))
def test_what_was_wrapped_comes_out(envelope):
    assert unwrap(wrap(envelope)) == envelope


def test_what_is_larger_than_a_piece_lies_in_several_records():
    envelope = b"x" * (2 * PIECE_BYTES + 1)
    content = wrap(envelope)
    assert len(content) == 3
    assert unwrap(RecordDict(dict(reversed(content.items())))) == envelope


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"0": MetricRecord({"place": 0})}),
        RecordDict({"0": ConfigRecord({"envelope": "text", "place": 0})}),
        RecordDict({"0": ConfigRecord({"envelope": b"", "place": 0, "more": b""})}),
        RecordDict({"0": ConfigRecord()}),
        RecordDict({"0": ConfigRecord({"envelope": b"", "place": 0}), "more": ConfigRecord()}),
        RecordDict({"0": ConfigRecord({"envelope": b"", "place": 0}), "more": MetricRecord()}),
    ],
)
def test_any_other_content_is_refused(content):
    with pytest.raises(MessageRefused, match=r"expected|came"):
        unwrap(content)


def test_an_oversized_envelope_is_refused():
    with pytest.raises(MessageRefused, match="at most 3 bytes"):
        unwrap(wrap(b"four"), max_message_bytes=3)
