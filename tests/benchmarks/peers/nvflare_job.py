"""Null rounds of NVFlare: federated averaging by its own recipe, in its own deployment of real processes over TLS.

Arguments: parameters, rounds, file for the sites' stamps. Runs in an environment of its own, which holds NVFlare.
"""

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import PocEnv

if __name__ == "__main__":
    parameters, rounds, stamps = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]).resolve()
    start = stamps.with_name("start.npy")
    np.save(start, np.zeros(parameters, dtype=np.float32))
    recipe = NumpyFedAvgRecipe(
        name="null",
        initial_ckpt=str(start),
        min_clients=3,
        num_rounds=rounds,
        train_script=str(Path(__file__).with_name("nvflare_site.py")),
        train_args=str(stamps),
    )
    run = recipe.execute(PocEnv(num_clients=3))
    sys.stdout.write(f"{run.get_status()} {run.get_result()}\n")
