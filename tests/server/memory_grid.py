"""A Grid in memory: real Flower messages, nodes that are functions. For tests of whoever talks to a Grid."""

import uuid

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class MemoryGrid(Grid):
    """Delivers a message to ``nodes[id]``, which returns replies, each ready after so many looks.

    A node is a function from Message to a list of (looks, reply); an empty list is silence.
    """

    def __init__(self, nodes):
        self.nodes = nodes
        self.waiting = {}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1

    def set_run(self, run):
        raise AssertionError(run)

    @property
    def run(self):
        return Run.create_empty(run_id=7)

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        accepted = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            if message.metadata.dst_node_id in self.nodes:
                accepted.append(message.metadata.message_id)
                self.waiting[message.metadata.message_id] = list(self.nodes[message.metadata.dst_node_id](message))
        return accepted

    def pull_messages(self, message_ids):
        found = []
        for message_id in message_ids:
            later = []
            for looks, reply in self.waiting.get(message_id, []):
                if looks > 0:
                    later.append((looks - 1, reply))
                else:
                    found.append(reply)
            self.waiting[message_id] = later
        return found

    def send_and_receive(self, messages, *, timeout=None):
        del timeout
        return self.pull_messages(self.push_messages(messages))
