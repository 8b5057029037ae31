"""How a site's bytes lie inside a Flower message: one message type, one ConfigRecord, one field of bytes.

Knows Flower's public Message API and nothing of what the bytes say. ``server/grid_cohort.py`` writes the same three
names; a test holds the two copies together.
"""

from typing import Final

from flwr.app import ConfigRecord, RecordDict

from fedgrade.errors import MessageRefused

# A Flower "query" carries no promise of being idempotent or of training, and needs no metrics beside it.
MESSAGE_TYPE: Final = "query.fedgrade"
RECORD: Final = "fedgrade"
FIELD: Final = "envelope"
MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024


def wrap(envelope: bytes) -> RecordDict:
    """``envelope`` as the content of a Flower message."""
    return RecordDict({RECORD: ConfigRecord({FIELD: envelope})})


def unwrap(content: RecordDict, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> bytes:
    """The bytes that ``wrap`` put into ``content``.

    Raises:
        MessageRefused: ``content`` is anything but one record with one field of at most ``max_message_bytes`` bytes.
    """
    record = content.get(RECORD)
    if len(content) != 1 or not isinstance(record, ConfigRecord):
        raise MessageRefused(f"message content: expected one ConfigRecord {RECORD!r}, got {sorted(content)[:4]!r}")
    envelope = record.get(FIELD)
    if len(record) != 1 or not isinstance(envelope, bytes):
        raise MessageRefused(f"record {RECORD!r}: expected one field {FIELD!r} of bytes, got {sorted(record)[:4]!r}")
    if len(envelope) > max_message_bytes:
        raise MessageRefused(f"envelope of {len(envelope)} bytes: at most {max_message_bytes} bytes are read")
    return envelope
