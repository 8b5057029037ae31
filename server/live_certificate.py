"""A renewed certificate counts for the next connection, without a restart and without an end to those that stand."""

import asyncio
import logging
import ssl
from collections.abc import Sequence
from typing import Final

from server.certificates import ServerCertificates
from server.nodes_file import version

logger = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0


async def follow_certificates(served: Sequence[tuple[ServerCertificates, ssl.SSLContext]]) -> None:
    """Bring each context up to date whenever its certificate file is replaced, until cancelled."""
    seen = [version(files.certificate) for files, _ in served]
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        for place, (files, context) in enumerate(served):
            now = version(files.certificate)
            if now != seen[place]:
                seen[place] = now
                _load(files, context)


def _load(files: ServerCertificates, context: ssl.SSLContext) -> None:
    try:
        # Tried elsewhere first: a certificate without its key would leave a live context with neither.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key)
        context.load_cert_chain(files.certificate, files.key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        logger.error("%s: not taken, the one before stays: %s", files.certificate, error)  # noqa: TRY400 -- a line does
    else:
        logger.warning("%s: renewed; new connections are shown it", files.certificate)
