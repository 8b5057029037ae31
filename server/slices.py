"""Long responses in slices, so that TLS works on what fits a processor's cache and waits for who reads slowly."""

from typing import Final

from server.metrics import Application, Receive, Scope, Send

SLICE_BYTES: Final = 256 * 1024


def in_slices(application: Application) -> Application:
    """``application``, each piece of a response's body sent in slices of at most ``SLICE_BYTES``.

    A server that is handed a hundred megabytes at once encrypts all of them into its memory before the first is sent.
    """

    async def sliced(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_slices(message: Scope) -> None:
            body = message.get("body", b"")
            if message["type"] != "http.response.body" or len(body) <= SLICE_BYTES:
                await send(message)
                return
            view = memoryview(body)
            for start in range(0, len(body), SLICE_BYTES):
                more = start + SLICE_BYTES < len(body) or message.get("more_body", False)
                await send({**message, "body": bytes(view[start : start + SLICE_BYTES]), "more_body": more})

        await application(scope, receive, send_slices)

    return sliced
