"""A resident node that sends each request back with a mark, as a process of its own: address, certificate, key."""

import signal
import sys
import threading
from pathlib import Path

from clients.node import NodeLink, serve

if __name__ == "__main__":
    address, certificate, key = sys.argv[1:4]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    link = NodeLink(
        address=address,
        root_certificate=Path(certificate),
        node_key=Path(key),
        idle_poll_seconds=0.5,
    )
    serve(
        link,
        lambda request: request + b"!",
        stop=stop,
        on_state=lambda state: sys.stdout.write(f"{state.phase} {state.detail}\n"),
    )
