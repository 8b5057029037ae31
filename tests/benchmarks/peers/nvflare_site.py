"""NVFlare's site: sends each model back as it came, and notes when it was asked."""

import sys
import time
from pathlib import Path

import nvflare.client as flare

if __name__ == "__main__":
    stamps = Path(sys.argv[1])
    flare.init()
    while flare.is_running():
        model = flare.receive()
        with stamps.open("a") as file:
            file.write(f"{flare.get_site_name()} {time.time()}\n")
        flare.send(flare.FLModel(params=model.params))
