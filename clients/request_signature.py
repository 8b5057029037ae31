"""Signs each request of this node over its method, path and body, for the session of the SuperLink that it is sent to.

An interceptor for flwr's HTTP client, the innermost of them: it sees the request as it leaves. A SuperLink that was
restarted has another session and says so when it refuses; then the request is signed anew, once, and sent again.
"""

import base64
import hashlib
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedgrade.trust.request_signature import HEADER, NO_SESSION, SESSION_HEADER, RequestClaim, is_session, sign

_NONCE_BYTES: Final = 16


def _microseconds() -> int:
    return time.time_ns() // 1000


class RequestSigner:
    """Adds the header by which a SuperLink knows who asks what; safe for several threads.

    Args:
        key: of this node.
        clock: microseconds since 1970 (UTC).
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, *, clock: Callable[[], int] = _microseconds) -> None:
        self._key = key
        self._own = base64.b64encode(public_key_to_bytes(key.public_key())).decode("ascii")
        self._clock = clock
        self._session = NO_SESSION

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        """The response to ``context.request``, signed."""
        session = self._session
        self._sign(context.request, session)
        response = call_next(context)
        told = response.headers.get(SESSION_HEADER, "")
        if response.status_code != httpx.codes.UNAUTHORIZED or told == session or not is_session(told):
            return response
        # Whatever a SuperLink calls its session, what is signed for it is of use to that SuperLink alone.
        self._session = told
        self._sign(context.request, told)
        return call_next(context)

    def _sign(self, request: httpx.Request, session: str) -> None:
        claim = RequestClaim(
            method=request.method,
            path=request.url.path,
            body_digest=hashlib.sha256(request.content).hexdigest(),
            session=session,
            nonce=secrets.token_hex(_NONCE_BYTES),
            time=self._clock(),
        )
        request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._own
        request.headers[HEADER] = sign(claim, self._key)
