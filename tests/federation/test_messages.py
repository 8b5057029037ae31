import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused, FedgradeError, MessageRefused, SignatureRefused
from fedgrade.federation import messages
from fedgrade.federation.messages import Reply, Request, read_message, write_message
from fedgrade.trust.canonical import digest
from fedgrade.trust.identity import SigningKey
from tests.federation.small_federation import NAMES, ask

KEY = SigningKey.generate()
TENSORS = bytes(range(40))
REQUEST = Request(site=NAMES[0], job="0" * 64, body=ask("train"), tensors_digest=digest(TENSORS))
FRAME = write_message(REQUEST, tensors=TENSORS, key=KEY)


def opened(raw):
    return read_message(raw, as_=Request, signed_by=KEY.public)


def test_what_was_written_is_read():
    assert opened(FRAME).document == REQUEST
    assert opened(FRAME).tensors == TENSORS


@given(st.integers(min_value=0, max_value=len(FRAME) - 1))
def test_a_frame_cut_short_anywhere_is_refused(length):
    with pytest.raises(FedgradeError):
        opened(FRAME[:length])


@given(st.integers(min_value=0, max_value=len(FRAME) - 1), st.integers(min_value=1, max_value=255))
def test_one_changed_byte_anywhere_is_refused(position, change):
    raw = bytearray(FRAME)
    raw[position] ^= change
    with pytest.raises(FedgradeError):
        opened(bytes(raw))


@given(st.binary(max_size=200))
def test_bytes_behind_a_frame_are_refused(more):
    if more:
        with pytest.raises(MessageRefused, match="not those that were signed for"):
            opened(FRAME + more)


@given(st.binary(max_size=300), st.integers(min_value=0, max_value=2**32 - 1))
def test_whatever_stands_behind_the_magic_is_refused(raw, length):
    with pytest.raises(FedgradeError):
        opened(struct.pack("<4sI", b"FGM1", length) + raw)


def test_a_length_that_reaches_beyond_the_frame_is_refused():
    with pytest.raises(MessageRefused, match="cut short"):
        opened(struct.pack("<4sI", b"FGM1", 2**32 - 1) + FRAME[8:])


def test_a_frame_above_the_limit_is_refused_before_anything_is_parsed(monkeypatch):
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", len(FRAME) - 1)
    with pytest.raises(MessageRefused, match=f"{len(FRAME)} bytes; the limit is {len(FRAME) - 1}"):
        opened(FRAME)


def test_a_message_by_someone_else_is_refused():
    with pytest.raises(SignatureRefused):
        opened(write_message(REQUEST, tensors=TENSORS, key=SigningKey.generate()))


def test_a_reply_is_no_request():
    body = messages.Admitted(head="{}", consistency=())
    reply = Reply(site=NAMES[0], request_digest="0" * 64, body=body, tensors_digest=digest(TENSORS))
    with pytest.raises(DocumentRefused, match="payload type"):
        opened(write_message(reply, tensors=TENSORS, key=KEY))


def test_equal_messages_are_equal_bytes():
    """What a coordinator asks again after a crash must be what it asked before, or a site cannot resend."""
    assert write_message(REQUEST, tensors=TENSORS, key=KEY) == FRAME
