"""The ServerApp of a run as it is, with trip wires: named by a test's own bundle in place of ``server.app``."""

import os
from functools import cache
from pathlib import Path

from fedgrade import job
from fedgrade.federation.conversation import Conversation
from server import coordinate  # noqa: F401 - before its names are wired
from tests.faults.steps import MARK, RUN, RUN_STEPS, SUM_RUN_STEPS, Wires

FOLDER = Path(os.environ[MARK])
# A plan is solved at each decoding, and the answer never changes.
job.calibrate = cache(job.calibrate)
WIRES = Wires(FOLDER, RUN, tuple(path.name for path in (FOLDER / "sites").iterdir()))
WIRES.stretch({**RUN_STEPS, **SUM_RUN_STEPS})
gather = Conversation.gather


def gather_in_place(self, purpose, round_index, tensors):
    WIRES.place = purpose, round_index
    return gather(self, purpose, round_index, tensors)


Conversation.gather = gather_in_place
