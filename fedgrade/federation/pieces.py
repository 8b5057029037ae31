"""How an envelope travels: in pieces of bounded size, each of which says which one it is.

No door has to take more than a piece at a time, a piece is on its way while the one before it is still being hashed,
and pieces fit memory that is used again and again, where each copy of a hundred megabytes has its pages made anew.
Knows no carrier: ``clients/`` and ``server/`` make one of Flower's records out of each piece.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from fedgrade.errors import MessageRefused
from fedgrade.federation.messages import MAX_MESSAGE_BYTES

# A Flower "query" carries no promise of being idempotent or of training, and needs no metrics beside it.
MESSAGE_TYPE: Final = "query.fedgrade"
FIELD: Final = "envelope"
PLACE: Final = "place"
PIECE_BYTES: Final = 2**22
# What a carrier writes around a piece: heads of objects, protobuf's framing; measured below 1 KiB.
FRAME_BYTES: Final = 2**16


def cut(envelope: bytes) -> list[dict[str, bytes | int]]:
    """``envelope`` in pieces of at most ``PIECE_BYTES``, in order; an empty one is one empty piece.

    No two are alike, whatever they hold: Flower names what it carries by content, and would keep only one of them.
    """
    view = memoryview(envelope)
    starts = range(0, max(len(envelope), 1), PIECE_BYTES)
    return [{FIELD: bytes(view[start : start + PIECE_BYTES]), PLACE: place} for place, start in enumerate(starts)]


def most_pieces(max_bytes: int) -> int:
    """In how many pieces an envelope of at most ``max_bytes`` comes."""
    return max(1, -(-max_bytes // PIECE_BYTES))


def join(pieces: Iterable[Mapping[str, object]], *, max_bytes: int = MAX_MESSAGE_BYTES) -> bytes:
    """The envelope that ``cut`` made ``pieces`` of, which may come in any order.

    Raises:
        MessageRefused: a piece has other fields, is too large, is missing or comes twice, or all of them together
            exceed ``max_bytes``.
    """
    found: dict[int, bytes] = {}
    size = 0
    for piece in pieces:
        content, place = piece.get(FIELD), piece.get(PLACE)
        if len(piece) != 2 or not isinstance(content, bytes) or type(place) is not int:  # noqa: PLR2004
            raise MessageRefused(
                f"piece: expected two fields, {FIELD!r} of bytes and {PLACE!r}, got {sorted(piece)[:4]!r}"
            )
        if len(content) > PIECE_BYTES or place in found:
            raise MessageRefused(f"piece {place}: {len(content)} bytes, comes twice or exceeds {PIECE_BYTES} bytes")
        found[place] = content
        size += len(content)
        if size > max_bytes:
            raise MessageRefused(f"envelope of over {size} bytes: at most {max_bytes} bytes are read")
    if not found or found.keys() != set(range(len(found))):
        raise MessageRefused(f"envelope: of its pieces only {sorted(found)[:4]} came")
    return found[0] if len(found) == 1 else b"".join(found[place] for place in range(len(found)))
