import asyncio

import pytest

from server.slices import SLICE_BYTES, in_slices


def sent(*pieces):
    """The messages that come of a response with these pieces."""

    async def application(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number, piece in enumerate(pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces) - 1})

    messages = []

    async def send(message):
        messages.append(message)

    asyncio.run(in_slices(application)({"type": "http"}, None, send))
    return messages


@pytest.mark.parametrize("size", [0, 1, SLICE_BYTES - 1, SLICE_BYTES, SLICE_BYTES + 1, 3 * SLICE_BYTES, 1_000_003])
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_same_bytes_leave_in_the_same_order_and_end_once(size, pieces):
    body = bytes(number % 251 for number in range(size))
    start, *rest = sent(*[body] * pieces)
    assert start["type"] == "http.response.start"
    assert b"".join(message["body"] for message in rest) == body * pieces
    assert max(len(message["body"]) for message in rest) <= SLICE_BYTES
    assert [message["more_body"] for message in rest] == [True] * (len(rest) - 1) + [False]
