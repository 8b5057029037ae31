"""fedgrade's run of null rounds: its own transport to its own nodes, which send each request back."""

import json
import os
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgrade.memory import keep_large_buffers
from server.grid_cohort import GridCohort
from server.nodes_file import read_nodes

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """So many rounds of so many parameters, four bytes each, with every node in the run's folder."""
    keep_large_buffers()  # as server.app does
    stamps = Path(str(context.run_config["stamps"]))
    cohort = GridCohort(grid, read_nodes(stamps.parent))
    finished = []
    for _ in range(int(context.run_config["rounds"])):
        # Fresh bytes: what was sent before would not be sent again.
        model = os.urandom(4 * int(context.run_config["parameters"]))
        replies = cohort.ask(dict.fromkeys(cohort.nodes, model), deadline_seconds=600)
        if any(replies[site] != model + b"!" for site in cohort.nodes):
            raise RuntimeError("a reply is not what was asked")
        finished.append(time.time())
    stamps.write_text(json.dumps(finished))
