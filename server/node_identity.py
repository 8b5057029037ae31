"""A request names its node: that must be the one whose key signed it. Stands where flwr authenticates nodes.

flwr's own layer checks this too, and a second signature, over a time alone, which costs node and SuperLink a
millisecond a request and says nothing that the first one (server/signed_requests.py) has not said.
"""

from typing import Final

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest, RegisterNodeFleetRequest
from google.protobuf.message import Message  # type: ignore[import-untyped]
from starlette.concurrency import run_in_threadpool

from server.metrics import Application, Receive, Scope, Send
from server.pushed_messages import require_own_reply

NODE_KEY: Final = "fedgrade_node_key"  # in a request's state: PEM of the enrolled key that signed it
_FLEET: Final = "/v1/fleet/"


class KeyOwnsNode:
    """An ASGI layer behind flwr's, which has read the request's message when this is called."""

    def __init__(self, app: Application) -> None:
        self._application = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on.

        Raises:
            HTTPException: it names another node than that of the key that signed it, or none; or it pushes something
                else than a reply of that node.
        """
        if scope["type"] == "http" and scope["path"].startswith(_FLEET):
            message = scope["state"].get("protobuf_request")
            # Without one there is no such route, and flwr says so.
            if isinstance(message, Message):
                await run_in_threadpool(_require, scope, message)
        await self._application(scope, receive, send)


def _require(scope: Scope, message: Message) -> None:
    if not _owns(scope, message):
        raise HTTPException(401, "the request names another node than that of the key that signed it")
    if isinstance(message, PushMessagesRequest):
        require_own_reply(message, scope["app"].state.linkstate_factory.state().object_store)


def _owns(scope: Scope, message: Message) -> bool:
    key = scope["state"].get(NODE_KEY)
    if key is None:
        return False
    if isinstance(message, ActivateNodeRequest | RegisterNodeFleetRequest):
        return bool(message.public_key == key)
    fields = message.DESCRIPTOR.fields_by_name
    named = message.node.node_id if "node" in fields else message.node_id if "node_id" in fields else None
    found = scope["app"].state.linkstate_factory.state().get_node_id_by_public_key(key)
    return found is not None and found == named
