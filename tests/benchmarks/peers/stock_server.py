"""Stock Flower's run: its own federated averaging over every node, and when each round was done."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    """Notes when a round has been averaged."""

    stamps: list[float]

    def aggregate_train(self, server_round, replies):
        """As Flower does it."""
        averaged = super().aggregate_train(server_round, replies)
        self.stamps.append(time.time())
        return averaged


@app.main()
def main(grid: Grid, context: Context) -> None:
    """So many rounds of so many parameters with three nodes."""
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    strategy.stamps = []
    start = ArrayRecord([np.zeros(int(context.run_config["parameters"]), dtype=np.float32)])
    strategy.start(grid, start, num_rounds=int(context.run_config["rounds"]), timeout=600)
    Path(str(context.run_config["stamps"])).write_text(json.dumps(strategy.stamps))
