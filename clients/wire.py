"""How a site's bytes lie inside a Flower message: one ConfigRecord for each of their pieces, and nothing else.

Knows Flower's public Message API and nothing of what the bytes say; ``server/grid_cohort.py`` writes the same.
"""

from flwr.app import ConfigRecord, RecordDict

from fedgrade.errors import MessageRefused
from fedgrade.federation.messages import MAX_MESSAGE_BYTES
from fedgrade.federation.pieces import cut, join


def wrap(envelope: bytes) -> RecordDict:
    """``envelope`` as the content of a Flower message."""
    return RecordDict({str(place): ConfigRecord(piece) for place, piece in enumerate(cut(envelope))})


def unwrap(content: RecordDict, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> bytes:
    """The bytes that ``wrap`` put into ``content``.

    Raises:
        MessageRefused: ``content`` is anything but the pieces of at most ``max_message_bytes`` bytes.
    """
    if not all(isinstance(record, ConfigRecord) for record in content.values()):
        raise MessageRefused(f"message content: expected ConfigRecords alone, got {sorted(content)[:4]!r}")
    return join(content.config_records.values(), max_bytes=max_message_bytes)
