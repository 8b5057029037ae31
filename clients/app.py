"""The ClientApp: hands a message's bytes to the site's process behind its socket, and the reply back.

For Flower's simulation engine; a stock SuperNode that runs it cannot connect to fedgrade's own SuperLink, for requests
there are signed in another way. Whoever runs a coordinator's bundle in it: the bundle finds neither keys nor photos,
only a socket that answers as ``Site.answer`` answers everyone.
The socket is ``agent-socket`` in the node's configuration or, in a simulation, ``<partition-id>.sock`` in the folder
that the environment variable FEDGRADE_AGENT_SOCKETS names.
"""

import os
from pathlib import Path
from typing import Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.agent import AgentClient
from clients.wire import unwrap, wrap
from fedgrade.errors import DocumentRefused

SOCKETS: Final = "FEDGRADE_AGENT_SOCKETS"
SOCKET_KEY: Final = "agent-socket"
PARTITION_KEY: Final = "partition-id"

app = ClientApp()


@app.query("fedgrade")  # type: ignore[untyped-decorator]
def answer(message: Message, context: Context) -> Message:
    """The site's reply to ``message``.

    Raises:
        MessageRefused: the message is not the pieces of an envelope.
        AgentUnavailable: the site's process does not answer; Flower sends an error in the reply's place.
    """
    with AgentClient(_socket(context)) as agent:
        reply = agent.answer(unwrap(message.content), timeout_seconds=message.metadata.ttl)
    return Message(wrap(reply), reply_to=message)


@app.query("partition")  # type: ignore[untyped-decorator]
def partition(message: Message, context: Context) -> Message:
    """Which partition this node is: Flower gives simulated nodes their ids only when the run has begun."""
    record = ConfigRecord({PARTITION_KEY: int(context.node_config[PARTITION_KEY])})
    return Message(RecordDict({PARTITION_KEY: record}), reply_to=message)


def _socket(context: Context) -> Path:
    """Where the site listens.

    Raises:
        DocumentRefused: neither the node's configuration nor the environment says so.
    """
    if given := context.node_config.get(SOCKET_KEY):
        return Path(str(given))
    folder, number = os.environ.get(SOCKETS), context.node_config.get(PARTITION_KEY)
    if folder is None or number is None:
        raise DocumentRefused(
            f"no socket: give the SuperNode --node-config '{SOCKET_KEY}=\"/path/to/agent.sock\"', "
            f"or set {SOCKETS} for a simulation"
        )
    return Path(folder) / f"{int(number)}.sock"
