"""The same job in Flower's simulation engine (Ray), every site in this process.

The sites' ``answer`` stays here, behind one socket each; Ray's actors run ``clients.app``, which forwards bytes. So
the simulation exercises Flower's scheduling and messages, and no key, photo or model is ever serialised into an actor.
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from clients.agent import AgentServer
from clients.app import PARTITION_KEY, SOCKETS
from clients.app import app as client_app
from clients.gate import Gate
from fedgrade.errors import RoundFailed
from fedgrade.trust.identity import SiteId
from server.grid_cohort import GridCohort
from server.superlink import QUIET

_JOIN_SECONDS: Final = 120.0
_ACTORS: Final = 2  # they only forward bytes


def simulate(answers: Mapping[SiteId, Callable[[bytes], bytes]], coordinate: Callable[[GridCohort], None]) -> None:
    """Run ``coordinate`` over sites that reply with ``answers``, through Flower's simulation engine.

    Must be called from the main thread, like Ray itself. ``coordinate`` runs in a thread of its own, and ``answers``
    in others, one request at a time a site.

    Raises:
        RoundFailed: the simulated nodes did not come up; whatever ``coordinate`` raises passes through.
    """
    os.environ.update(QUIET)
    # After QUIET: flwr reads its telemetry switch when it is imported. Ray takes a second and is needed only here.
    import ray  # noqa: PLC0415
    from flwr.simulation import run_simulation  # noqa: PLC0415

    sites = list(answers)
    server_app = ServerApp()

    @server_app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        del context
        coordinate(GridCohort(grid, _nodes(grid, sites)))

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedgrade-")))
        # Ray's workers inherit the environment, and Ray forks: a fork while gRPC's threads run can hang, so Ray comes
        # before the agents.
        os.environ[SOCKETS] = str(folder)
        stack.callback(os.environ.pop, SOCKETS, None)
        stack.callback(ray.shutdown)
        with _without_expected_warnings():
            ray.init(num_cpus=_ACTORS, num_gpus=0, include_dashboard=False, log_to_driver=False)
        for number, answer in enumerate(answers.values()):
            stack.enter_context(AgentServer(Gate(answer), folder / f"{number}.sock"))
        with _without_expected_warnings():
            run_simulation(
                server_app=server_app,
                client_app=client_app,
                num_supernodes=len(sites),
                # The actors only forward bytes; the work is done in this process.
                backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
            )


def _nodes(grid: Grid, sites: Sequence[SiteId]) -> dict[SiteId, int]:
    """Which simulated node serves which site, asked of the nodes themselves.

    Raises:
        RoundFailed: not all of them answered within two minutes.
    """
    deadline = time.monotonic() + _JOIN_SECONDS
    while len(nodes := list(grid.get_node_ids())) < len(sites) and time.monotonic() < deadline:
        time.sleep(0.05)
    content = RecordDict({PARTITION_KEY: ConfigRecord({PARTITION_KEY: 0})})
    questions = [Message(content, node, f"query.{PARTITION_KEY.partition('-')[0]}") for node in nodes]
    replies = grid.send_and_receive(questions, timeout=max(1.0, deadline - time.monotonic()))
    found = {
        sites[int(reply.content[PARTITION_KEY][PARTITION_KEY])]: int(reply.metadata.src_node_id)
        for reply in replies
        if reply.has_content()
    }
    if len(found) != len(sites):
        raise RoundFailed(f"simulation: {len(found)} of {len(sites)} nodes came up within {_JOIN_SECONDS:.0f} s")
    return found


@contextmanager
def _without_expected_warnings() -> Iterator[None]:
    """Hold back two notices that nobody here can act on, and nothing else.

    flwr logs that ``run_simulation`` will go; its successor, ``flwr run . local``, leaves a SuperLink running in the
    background and cannot take ``coordinate`` as an argument. flwr is pinned, and when the function goes, the import
    above fails loudly. Ray warns that a later version will treat GPU variables differently; the actors use none.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "run_simulation" not in record.getMessage()

    flwr_logger = logging.getLogger("flwr")
    flwr_logger.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Tip: In future versions of Ray", category=FutureWarning)
            yield
    finally:
        flwr_logger.removeFilter(keep)
