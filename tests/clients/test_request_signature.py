"""A node's signature on its requests, and what it makes of what a SuperLink calls its session."""

import base64
import hashlib
from types import SimpleNamespace

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from clients.request_signature import RequestSigner
from fedgrade.trust.request_signature import HEADER, NO_SESSION, SESSION_HEADER, read_header

KEY = ec.generate_private_key(ec.SECP384R1())
SESSION = "ab" * 16


class SuperLink:
    """Answers 401 and tells its session until a request is signed for it."""

    def __init__(self, *sessions):
        self.sessions, self.claims = list(sessions), []

    def __call__(self, context):
        request = context.request
        signed = read_header(request.headers[HEADER], method=request.method, path=request.url.path)
        signed.verify(load_pem_public_key(base64.b64decode(request.headers["flwr-public-key"])))
        assert signed.claim.body_digest == hashlib.sha256(request.content).hexdigest()
        self.claims.append(signed.claim)
        own = self.sessions.pop(0) if len(self.sessions) > 1 else self.sessions[0]
        status = 200 if signed.claim.session == own else 401
        return httpx.Response(status, headers={SESSION_HEADER: own}, request=request)


def sent(signer, superlink):
    request = httpx.Request("POST", "https://a.example:1/v1/fleet/pull-messages", content=b"body")
    return signer.intercept(SimpleNamespace(request=request), superlink).status_code


def test_a_session_is_learnt_once_and_every_request_has_a_nonce_of_its_own():
    signer, superlink = RequestSigner(KEY), SuperLink(SESSION)
    assert [sent(signer, superlink) for _ in range(3)] == [200, 200, 200]
    assert [claim.session for claim in superlink.claims] == [NO_SESSION, SESSION, SESSION, SESSION]
    assert len({claim.nonce for claim in superlink.claims}) == 4


def test_a_superlink_that_was_started_again_costs_one_more_request():
    signer, superlink = RequestSigner(KEY), SuperLink(SESSION)
    sent(signer, superlink)
    superlink.sessions = ["cd" * 16]
    assert sent(signer, superlink) == 200
    assert len(superlink.claims) == 4


def test_a_superlink_that_always_has_another_session_gets_two_requests_and_no_more():
    superlink = SuperLink(*(f"{number:032x}" for number in range(1, 50)))
    assert sent(RequestSigner(KEY), superlink) == 401
    assert len(superlink.claims) == 2


@pytest.mark.parametrize("told", ["", "x" * 32, "ab", "AB" * 16])
def test_what_is_no_session_is_not_signed_for(told):
    superlink = SuperLink(told)
    assert sent(RequestSigner(KEY), superlink) == 401
    assert len(superlink.claims) == 1
