import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from clients import wire
from clients.wire import unwrap, wrap
from fedgrade.errors import MessageRefused
from server import grid_cohort, replies


@given(st.binary(max_size=2000))
def test_what_was_wrapped_comes_out(envelope):
    assert unwrap(wrap(envelope)) == envelope


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord({"envelope": b""})}),
        RecordDict({"fedgrade": MetricRecord({"envelope": 1})}),
        RecordDict({"fedgrade": ConfigRecord({"envelope": "text"})}),
        RecordDict({"fedgrade": ConfigRecord({"envelope": b"", "more": b""})}),
        RecordDict({"fedgrade": ConfigRecord()}),
        RecordDict({"fedgrade": ConfigRecord({"envelope": b""}), "more": ConfigRecord()}),
    ],
)
def test_any_other_content_is_refused(content):
    with pytest.raises(MessageRefused, match="expected one"):
        unwrap(content)


def test_an_oversized_envelope_is_refused():
    with pytest.raises(MessageRefused, match="at most 3 bytes"):
        unwrap(wrap(b"four"), max_message_bytes=3)


def test_both_doors_write_the_same_names():
    assert (grid_cohort.MESSAGE_TYPE, replies.RECORD, replies.FIELD) == (wire.MESSAGE_TYPE, wire.RECORD, wire.FIELD)
