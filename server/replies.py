"""Where replies come from: any Grid by its public methods, or Flower's HttpGrid faster and with less trust.

Knows flwr's private ``HttpGrid`` (pinned ``>=1.41,<1.42``; tests/server/test_flwr_contract.py holds the names).
``HttpGrid.pull_messages`` will not do: it fetches three objects a reply where one holds the bytes, waits 1 s and more
for an object still on its way, and fetches reply after reply, so that a node which announces a reply and never sends
it holds up all the others for two hours.
"""

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from flwr.app import ConfigRecord, Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.superlink.grid import HttpGrid

from fedgrade.federation.messages import MAX_MESSAGE_BYTES
from fedgrade.federation.pieces import most_pieces

if TYPE_CHECKING:
    import queue

logger = logging.getLogger(__name__)

# Of pieces of one reply on their way at once; every site has its own.
_AT_ONCE: Final = 2


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back for a request.

    Attributes:
        request: message id of the request.
        content: the records, or one line that says why there are none.
    """

    request: str
    content: tuple[ConfigRecord, ...] | str


class Source(Protocol):
    """Looks for replies."""

    def look(self, requests: Iterable[str], inbox: "queue.SimpleQueue[Reply]", deadline: float) -> set[str]:
        """Requests whose replies are announced; the replies follow into ``inbox``, before ``deadline`` or never."""


def source_of(grid: Grid) -> Source:
    """The fitting source for ``grid``."""
    return _HttpSource(grid) if isinstance(grid, HttpGrid) else _GridSource(grid)


class _GridSource:
    """Any Grid, by its public methods; its replies are complete when they are announced."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def look(self, requests: Iterable[str], inbox: "queue.SimpleQueue[Reply]", deadline: float) -> set[str]:
        del deadline
        wanted = set(requests)
        announced = set()
        for message in self._grid.pull_messages(wanted):
            request = message.metadata.reply_to_message_id
            if request in wanted:
                announced.add(request)
                inbox.put(Reply(request=request, content=_content(message)))
        return announced


class _HttpSource:
    """Flower's HttpGrid: one request a look, then one thread a reply."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._client = grid._runtime_client  # noqa: SLF001
        self._run_id = grid.run.run_id

    def look(self, requests: Iterable[str], inbox: "queue.SimpleQueue[Reply]", deadline: float) -> set[str]:
        wanted = set(requests)
        found = self._client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
        announced = set()
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            request = message.metadata.reply_to_message_id
            if request not in wanted:
                continue
            announced.add(request)
            if message.HasField("error"):
                inbox.put(Reply(request=request, content=_error(message.error.code, message.error.reason)))
                continue
            # Daemons: a pull that Flower retries for ever must not keep the run's process alive.
            work = (request, message.metadata.message_id, tree, inbox, deadline)
            threading.Thread(target=self._fetch, args=work, daemon=True).start()
        return announced

    def _fetch(
        self, request: str, message_id: str, tree: ObjectTree, inbox: "queue.SimpleQueue[Reply]", deadline: float
    ) -> None:
        try:
            content = self._pull(tree, deadline)
        except Exception as error:
            # The thread's last door: hostile bytes and lost connections make one site absent, and no other.
            logger.debug("reply to %s", request, exc_info=True)
            content = f"could not be fetched ({type(error).__name__}: {error})"
        inbox.put(Reply(request=request, content=content))
        # Last, because nobody waits for it; without it the SuperLink keeps the bytes until the run is over.
        with suppress(Exception):
            self._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self._grid.node, run_id=self._run_id, message_object_id=message_id)
            )

    def _pull(self, tree: ObjectTree, deadline: float) -> tuple[ConfigRecord, ...] | str:
        """The records of the announced reply, the bytes of each of which hash to its announced name."""
        records = tree.children[0].children if len(tree.children) == 1 else []
        if not 0 < len(records) <= most_pieces(MAX_MESSAGE_BYTES):
            return "expected records in one dictionary"
        names = [record.object_id for record in records]
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._grid.node, self._run_id)
        contents = pull_objects(
            names,
            pull_object_fn=pull,
            max_concurrent_pulls=_AT_ONCE,
            max_time=max(0.0, deadline - time.monotonic()),
            max_tries_per_object=None,
            initial_backoff=0.03,
            backoff_cap=0.2,
        )
        if any(get_object_id(contents[name]) != name for name in names):
            return "wrong hash"
        return tuple(ConfigRecord.inflate(contents.pop(name)) for name in names)


def _content(message: Message) -> tuple[ConfigRecord, ...] | str:
    if message.has_error():
        return _error(message.error.code, message.error.reason)
    if not all(isinstance(record, ConfigRecord) for record in message.content.values()):
        return "expected ConfigRecords alone"
    return tuple(message.content.config_records.values())


def _error(code: int, reason: str | None) -> str:
    return f"Flower error {code}: {(reason or 'no reason given')[:300]}"
