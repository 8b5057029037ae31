"""What Flower's SuperLink keeps, in memory, and of each message asks for what somebody fetches: its records.

Flower asks for the message and its dictionary as objects too, which its own nodes fetch and put together again. Ours,
and our runs, read what holds what from the tree that is announced, and take the records alone. An object that is
asked for and does not come leaves the whole push open, so not to send it is no way to save its request; not to ask
for it is one. flwr's classes used here are private API: tests/server/test_flwr_contract.py holds them.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig


class LeafStore(InMemoryObjectStore):  # type: ignore[misc]
    """Objects of messages, of which those that hold others are known by name and never come."""

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Expect all objects of ``object_tree``; the names of those that are missing and hold no others."""
        leaves = {node.object_id for node in iterate_object_tree(object_tree) if not node.children}
        # All at once: of what two messages share, nothing may be forgotten with the one while the other is announced.
        with self.lock_store:
            return [name for name in super().preregister(run_id, object_tree) if name in leaves]


class LeafState(InMemoryLinkState):  # type: ignore[misc]
    """Nodes, runs and messages; who announces a message learns whether it was taken, and a reply that came counts."""

    def start_session(self, run_id: int) -> str:
        """Begin a push, and forget those that are out of time and in which nothing was to be sent.

        Flower's end with what they await, at least the message itself; ours may await nothing.
        """
        with self._lock_object_push_sessions:
            for name, session in list(self._object_push_sessions.items()):
                if not session.pending_object_ids and session.expires_at <= now():
                    self._cleanup_push_session(name, cleanup_messages=False)
            return str(super().start_session(run_id))

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """Whether ``message`` was taken, and what to send of it.

        A message that was taken is itself among what to send, though only one without records is awaited: a second
        reply to one request is not taken, and without this sign it would look like one whose records are all there.
        """
        # Taken in this order where a push is out of time, too; in Flower's own, one thread can wait there for another
        # that waits for it here, and the SuperLink for both.
        with self._lock_object_push_sessions:
            taken, missing = super().store_message_and_object_tree(message, object_tree, session_id)
        return taken, list(dict.fromkeys([*missing, object_tree.object_id])) if taken else []

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """Replies to these requests, also of nodes that answered and went offline before anybody looked.

        Flower has an error in place of such a reply: a site that ends in mid-answer, as it is told to, would have paid
        for nothing. So it stays where the rest of a reply will not come, because its push was cut off.
        """
        with self.lock:
            answered = {name for name in message_ids if self._has_whole_reply(name)}
            replies = super().get_message_res(message_ids - answered, run_id) if message_ids - answered else []
            with self._held_for_online(answered):
                return replies + (super().get_message_res(answered, run_id) if answered else [])

    def _has_whole_reply(self, name: str) -> bool:
        reply = self.message_ins_id_to_message_res_id.get(name)
        push = self._object_push_sessions.get(self._object_push_session_by_root.get(reply or "", ""))
        return reply is not None and (push is None or not push.pending_object_ids)

    @contextmanager
    def _held_for_online(self, answered: Collection[str]) -> Iterator[None]:
        """Within the lock: whoever was asked these counts as online."""
        asked = {
            self.message_ins_store[name].metadata.dst_node_id for name in answered if name in self.message_ins_store
        }
        until = {node: self.nodes[node].online_until for node in asked if node in self.nodes}
        for node in until:
            self.nodes[node].online_until = math.inf
        try:
            yield
        finally:
            for node, before in until.items():
                self.nodes[node].online_until = before

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        """Forget these requests, with what they carried, and the replies to them.

        Flower keeps what a request carried until its node confirms it, which a node that is offline never does.
        """
        super().delete_messages(message_ins_ids)
        for name in message_ins_ids:
            self.object_store.delete(name)


class LeafLifespan(SuperLinkLifespan):  # type: ignore[misc]
    """Flower's own, over these two, which take the place of what ``create_app`` has made and nobody has used yet."""

    def __init__(self, config: SuperLinkLifespanConfig, state_factory: LinkStateFactory) -> None:
        store = LeafStore()
        state_factory.objectstore_factory.store_instance = store
        state_factory.state_instance = LeafState(state_factory.federation_manager, store)
        super().__init__(config, state_factory)
