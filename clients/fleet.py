"""The one file that knows flwr's private Fleet API: activate, pull one message, push one reply, deactivate.

It uses ``FleetHttpClient`` and not ``http_request_response`` above it, because that one ends the process when a
connection cannot be made (``os._exit`` after five seconds) and sends itself SIGINT on a 401: right for a command,
wrong for a process that must outlive its coordinator's restarts. flwr is pinned ``>=1.41,<1.42``, and
tests/clients/test_flwr_contract.py fails when a name or a signature used here moves. An app bundle is never asked for:
``GetFab`` is not called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_object_id,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient

from clients.outgoing import Outgoing
from clients.request_signature import RequestSigner
from fedgrade.errors import FedgradeError, MessageRefused
from fedgrade.federation.pieces import FRAME_BYTES, MESSAGE_TYPE, PIECE_BYTES, join, most_pieces

_PULL_SECONDS: Final = 120.0
# Of pieces on their way at once; the SuperLink answers a node key no more than a handful of requests at a time.
_AT_ONCE: Final = 2
_MAX_SAID_CHARACTERS: Final = 300
_LATER: Final = frozenset(
    {
        httpx.codes.REQUEST_TIMEOUT,
        httpx.codes.TOO_MANY_REQUESTS,
        httpx.codes.BAD_GATEWAY,
        httpx.codes.SERVICE_UNAVAILABLE,
        httpx.codes.GATEWAY_TIMEOUT,
    }
)

Result = TypeVar("Result")


class LinkDown(FedgradeError):
    """The SuperLink cannot be reached now; the same call may succeed later."""


class LinkRefused(FedgradeError):
    """The SuperLink was reached and refused: wrong authority, unknown node key, or the run is over."""


@dataclass(frozen=True, kw_only=True)
class FleetAccess:
    """What one connection needs.

    Attributes:
        address: ``host:port`` of the SuperLink's public listener.
        root_certificate: PEM of the coordinator's private authority.
        key: the node's EC P-384 key; only its public half leaves the site, at enrolment.
        max_message_bytes: larger messages are refused before their bytes are read.
        heartbeat_seconds: the SuperLink holds the node for alive during twice this time.
    """

    address: str
    root_certificate: bytes
    key: ec.EllipticCurvePrivateKey
    max_message_bytes: int
    heartbeat_seconds: float


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A message announced by the SuperLink, whose bytes have not been fetched yet."""

    message: Message
    tree: ObjectTree

    @property
    def run_id(self) -> int:
        """The run that sent it."""
        return int(self.message.metadata.run_id)


class FleetConnection:
    """One authenticated conversation with a SuperLink over TLS; safe for one worker and one heartbeat thread."""

    def __init__(self, access: FleetAccess) -> None:
        self._access = access
        try:
            self._client = FleetHttpClient.from_server_address(
                access.address,
                insecure=False,
                root_certificates=access.root_certificate,
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    RequestSigner(access.key),
                ],
            )
        except (ValueError, OSError) as error:  # ssl.SSLError is an OSError
            raise LinkRefused(f"SuperLink {access.address}: root certificate is not usable PEM ({error})") from error
        # A redirect would let a SuperLink aim the node's requests at the partner's own network.
        self._client._client.follow_redirects = False  # noqa: SLF001
        self._client._client.event_hooks = {"response": [self._refuse_oversized]}  # noqa: SLF001
        self._node = Node()

    def activate(self) -> int:
        """Announce the node as online; its id at the SuperLink.

        Raises:
            LinkDown: no answer.
            LinkRefused: wrong authority, unknown key, or the node is still held for online elsewhere.
        """
        public_key = self._access.key.public_key()
        response = self._call(
            self._client.ActivateNode,
            ActivateNodeRequest(
                public_key=public_key_to_bytes(public_key), heartbeat_interval=self._access.heartbeat_seconds
            ),
        )
        self._node = Node(node_id=response.node_id)
        return int(response.node_id)

    def go_on(self, node_id: int) -> int:
        """Be the node ``node_id`` that this key's node was before its process died, and that may still count as online.

        Raises:
            LinkDown: no answer.
            LinkRefused: this key's node is another, or is no longer enrolled.
        """
        self._node = Node(node_id=node_id)
        try:
            self.heartbeat()
        except FedgradeError:
            self._node = Node()
            raise
        return node_id

    def heartbeat(self) -> None:
        """Tell the SuperLink that the node is still there.

        Raises:
            LinkDown: no answer.
            LinkRefused: the SuperLink no longer knows the node.
        """
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self._access.heartbeat_seconds)
        if not self._call(self._client.SendNodeHeartbeat, request).success:
            raise LinkRefused(f"SuperLink {self._access.address}: the node is no longer enrolled")

    def receive(self) -> Parcel | None:
        """The next message for this node, if there is one. The SuperLink hands each out once.

        Raises:
            LinkDown: no answer.
            LinkRefused: the node is no longer enrolled.
            MessageRefused: what came is no message.
        """
        response = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list or not response.message_object_trees:
            return None
        try:
            message = message_from_proto(response.messages_list[0])
        except Exception as error:
            # flwr's decoders raise whatever they meet in hostile bytes.
            raise MessageRefused(f"message: unreadable ({type(error).__name__})") from error
        return Parcel(message=message, tree=response.message_object_trees[0])

    def fetch(self, parcel: Parcel) -> bytes:
        """The bytes inside ``parcel``.

        Guarantee: no more pieces than the largest message has are fetched, nothing else, none that is larger than a
        piece, and the bytes of each hash to the name under which the SuperLink announced it.

        Raises:
            MessageRefused: another type, shape or size.
            LinkDown: no answer.
            LinkRefused: the run is over.
        """
        limit = self._access.max_message_bytes
        records = _announced_records(parcel, most=most_pieces(limit))
        pull = make_pull_object_fn_protobuf(
            lambda request: self._call(self._client.PullObject, request), self._node, parcel.run_id
        )
        try:
            contents = pull_objects(
                records,
                pull_object_fn=pull,
                max_concurrent_pulls=_AT_ONCE,
                max_time=_PULL_SECONDS,
                # Pieces that are still on their way to the SuperLink are not worth giving up a message for.
                max_tries_per_object=None,
                initial_backoff=0.03,
                backoff_cap=0.2,
            )
        except ObjectPullError as error:
            raise MessageRefused(f"record {records[0][:16]}: it, or one beside it, never arrived ({error})") from error
        return join((_inflate(record, contents.pop(record)) for record in records), max_bytes=limit)

    def confirm(self, parcel: Parcel) -> None:
        """Let the SuperLink forget the request's objects.

        Raises:
            LinkDown: no answer.
            LinkRefused: the run is over.
        """
        confirm = make_confirm_message_received_fn_protobuf(
            lambda request: self._call(self._client.ConfirmMessageReceived, request), self._node, parcel.run_id
        )
        confirm(parcel.message.metadata.message_id)

    def send(self, outgoing: Outgoing) -> None:
        """Send a reply, or what is left of it.

        Raises:
            LinkDown: no answer; the same call may succeed later.
            LinkRefused: the run is over, or the SuperLink did not take all of it.
        """
        if outgoing.session is None:
            self._announce(outgoing)
        push_one = make_push_object_fn_protobuf(
            lambda request: self._call(self._client.PushObject, request),
            self._node,
            outgoing.message.metadata.run_id,
            str(outgoing.session),
        )

        def push(name: str, body: bytes) -> None:
            try:
                push_one(name, body)
            except ObjectPushError:
                # Or it has it, and its answer was lost: what was not surely delivered counts as not delivered.
                outgoing.refused.add(name)
            del outgoing.left[name]

        push_object_contents_from_iterable(list(outgoing.left.items()), push, max_concurrent_pushes=_AT_ONCE)
        if outgoing.refused:
            raise LinkRefused(f"SuperLink {self._access.address}: it did not take {len(outgoing.refused)} of the reply")

    def _announce(self, outgoing: Outgoing) -> None:
        response = self._call(
            self._client.PushMessages,
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(outgoing.message))],
                message_object_trees=[outgoing.tree],
                clientapp_runtime_list=[0.0],  # how long a site computes is no business of the SuperLink
            ),
        )
        wanted = set(response.objects_to_push)
        if outgoing.message.metadata.message_id not in wanted:
            raise LinkRefused(
                f"SuperLink {self._access.address}: it does not want this reply; the request was answered, or is over"
            )
        outgoing.left = {name: body for name, body in outgoing.left.items() if name in wanted}
        outgoing.session = response.session_id

    def close(self) -> None:
        """Announce the node as offline if the SuperLink still listens, and close the connection."""
        try:
            if self._node.node_id:
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
        except (LinkDown, LinkRefused):
            # The SuperLink will find out by itself: no heartbeat comes.
            return
        finally:
            self._client.close()

    def _call(self, method: Callable[..., Result], request: object) -> Result:
        """``method(request)``, with httpx's many ways to fail told apart into later and no."""
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            text = f"SuperLink {self._access.address}: HTTP {status} for {error.request.url.path}"
            said = FlowerError.from_json(error.response.text)
            text += f" ({_plain(said.message)})" if said else _hint(status)
            raise (LinkDown if status in _LATER else LinkRefused)(text) from error
        except httpx.TransportError as error:
            if "certificate" in str(error).lower():
                raise LinkRefused(
                    f"SuperLink {self._access.address}: not signed by the authority given ({error})"
                ) from error
            raise LinkDown(f"SuperLink {self._access.address}: {error or type(error).__name__}") from error
        except ValueError as error:
            raise LinkRefused(f"SuperLink {self._access.address}: unreadable response ({error})") from error

    def _refuse_oversized(self, response: httpx.Response) -> None:
        """Called by httpx before a body is read: without a declared, bounded, uncompressed length it is not read."""
        limit = PIECE_BYTES + FRAME_BYTES
        length = response.headers.get("content-length", "")
        if response.headers.get("content-encoding", "identity") != "identity" or not length.isdecimal():
            raise MessageRefused("SuperLink response: a plain body of declared length is required")
        if int(length) > limit:
            raise MessageRefused(f"SuperLink response of {length} bytes: at most {limit} bytes are read")


def _announced_records(parcel: Parcel, *, most: int) -> list[str]:
    """The names of the records inside the one dictionary inside ``parcel``.

    Raises:
        MessageRefused: another message type or shape, or more than ``most`` records.
    """
    kind = parcel.message.metadata.message_type
    if kind != MESSAGE_TYPE:
        raise MessageRefused(f"message type {kind[:40]!r}: only {MESSAGE_TYPE!r} is answered")
    dictionaries = parcel.tree.children
    records = dictionaries[0].children if len(dictionaries) == 1 else []
    names = [str(record.object_id) for record in records if not record.children]
    if not 0 < len(records) <= most or len(set(names)) != len(records):
        raise MessageRefused(f"message content: 1 to {most} records, no two alike, in one dictionary are read")
    return names


def _inflate(name: str, content: bytes) -> ConfigRecord:
    """The record that ``content`` spells, after its hash has been checked."""
    try:
        record = ConfigRecord.inflate(content) if get_object_id(content) == name else None
    except Exception as error:
        # flwr's parsers raise whatever they meet in hostile bytes: ValueError, KeyError, DecodeError, IndexError …
        raise MessageRefused(f"record {name[:16]}: unreadable ({type(error).__name__})") from error
    if not isinstance(record, ConfigRecord):
        raise MessageRefused(f"record {name[:16]}: its bytes do not hash to its name")
    return record


def _plain(text: str) -> str:
    """What a SuperLink says, fit for this site's log and terminal."""
    return "".join(character if character.isprintable() else "?" for character in text[:_MAX_SAID_CHARACTERS])


def _hint(status: int) -> str:
    match status:
        case httpx.codes.UNAUTHORIZED:
            return (
                "; the SuperLink was started again, which heals itself within seconds, or this node key is not "
                "enrolled, or the clock is off by minutes"
            )
        case httpx.codes.FORBIDDEN:
            return "; the run is over"
        case _:
            return ""
