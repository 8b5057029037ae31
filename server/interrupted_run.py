"""The run of a served folder whose process died without a word: it is submitted again, from its checkpoint.

A run that ends says how in its record; one that was killed, with its SuperLink or alone, leaves the record open. Sites
send again what they charged for, so that taking a run up costs nobody anything.
"""

import logging
import time
from typing import Final

from fedgrade.errors import FedgradeError
from fedgrade.job import TrainingJob
from server.app import RUN_DIRECTORY
from server.attached import is_held
from server.control import Control
from server.coordinator_folder import CoordinatorFolder
from server.nodes_file import read_nodes, version
from server.run_record import NAME, read_record

logger = logging.getLogger(__name__)

# Longer than `fedgrade stop` takes from the end of a run's process to the record that says so.
_LOOK_SECONDS: Final = 2.0
# A run whose process dies every time before its next stage is for a person to look at.
_TRIES: Final = 3


class InterruptedRun:
    """Takes up the run that was on, as soon as enough of its sites are online."""

    def __init__(self, control: Control, folder: CoordinatorFolder) -> None:
        self._control = control
        self._folder = folder
        # With the processes that served before, a run's is gone too: that is known at the first look.
        self._was_gone = True
        self._next = 0.0
        self._job: TrainingJob | None = None
        self._seen: object = None
        self._standing: tuple[str, int] = "", 0
        self._tries = 0

    def follow(self) -> None:
        """Look every other second; a run that is gone at two looks is submitted. What fails is tried again."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LOOK_SECONDS
        try:
            # Whether there is a job at all is asked last: to read it is to solve its plan.
            gone = not is_held(self._folder.ledger) and self._any_open_record() and not self._control.unfinished()
            if gone and self._was_gone:
                self._take_up()
            self._was_gone = gone
        except FedgradeError as error:
            logger.warning("interrupted run not taken up yet: %s", error)

    def _any_open_record(self) -> bool:
        folders = (path.parent for path in (self._folder.root / "jobs").glob(f"*/{NAME}"))
        return any((record := read_record(folder)) is not None and not record.outcome for folder in folders)

    def _take_up(self) -> None:
        job = self._current_job()
        record = read_record(self._folder.job_folder(job)) if job is not None else None
        if job is None or record is None or record.outcome or not self._enough_online(job):
            return
        if (job.digest, record.done) != self._standing:
            self._standing, self._tries = (job.digest, record.done), 0
        self._tries += 1
        if self._tries <= _TRIES:
            run_id = self._control.submit({RUN_DIRECTORY: str(self._folder.root.resolve())})
            logger.warning("run %d goes on with job %s, whose process was gone", run_id, job.digest[:16])
        elif self._tries == _TRIES + 1:
            logger.error(
                "job %s: its process died %d times in stage %d; see logs/, then `fedgrade resume %s`",
                job.digest[:16],
                _TRIES,
                record.done + 1,
                self._folder.root,
            )

    def _current_job(self) -> TrainingJob | None:
        """The job that is on, read again when it is another one; None where there is none that can be read."""
        seen = version(self._folder.current_job)
        if seen != self._seen:
            self._seen, self._job = seen, None
            try:
                self._job = self._folder.read_job()
            except FedgradeError as error:
                logger.warning("no run is taken up: %s", error)
        return self._job

    def _enough_online(self, job: TrainingJob) -> bool:
        nodes, online = read_nodes(self._folder.root), self._control.online()
        return sum(nodes.get(site) in online for site in job.participants) >= job.spec.aggregation.minimum_sites
