"""The run of a served folder whose process died without a word: it is submitted again, from its checkpoint.

A run that ends says how in its record; one that was killed, with its SuperLink or alone, leaves the record open. Sites
send again what they charged for, so that taking a run up costs nobody anything.
"""

import logging
import time
from typing import Final

from fedgrade.errors import FedgradeError
from fedgrade.job import TrainingJob
from fedgrade.trust.file_lock import is_held
from server.app import RUN_DIRECTORY
from server.beside import Beside
from server.control import Control
from server.coordinator_folder import CoordinatorFolder
from server.nodes_file import read_nodes, version
from server.run_record import NAME, note_given_up, note_try, read_record

logger = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 2.0
# After each try: what killed the run may be over by then. A run whose process dies every time before its next stage is
# for a person to look at.
_PAUSES_SECONDS: Final = (5.0, 25.0, 25.0)


class InterruptedRun:
    """Takes up the run that was on, as soon as enough of its sites are online.

    How often it did stands in the run's record: neither the SuperLink nor ``fedgrade serve`` forgets it when it dies.
    """

    def __init__(self, control: Control, folder: CoordinatorFolder) -> None:
        self._control = control
        self._folder = folder
        # With the processes that served before, a run's is gone too: that is known at the first look.
        self._was_gone = True
        self._next = 0.0
        self._not_before = 0.0
        self._job: TrainingJob | None = None
        self._seen: object = None
        # To read a job is to solve its plan, which takes seconds in which revocations are to be taken note of.
        self._beside = Beside("interrupted run")

    def restarted(self) -> None:
        """The SuperLink is another one, and the processes of the one before are gone."""
        self._was_gone = True

    def follow(self) -> None:
        """Look every other second; a run that is gone at two looks is submitted. What fails is tried again."""
        if self._beside.busy or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LOOK_SECONDS
        try:
            gone = not is_held(self._folder.ledger) and self._any_open_record() and not self._control.unfinished()
            if gone and self._was_gone:
                self._beside.begin(self._try_to_take_up)
            self._was_gone = gone
        except (FedgradeError, OSError) as error:
            logger.warning("interrupted run not taken up yet: %s", error)

    def _try_to_take_up(self) -> None:
        try:
            self._take_up()
        except (FedgradeError, OSError) as error:
            logger.warning("interrupted run not taken up yet: %s", error)

    def _any_open_record(self) -> bool:
        folders = (path.parent for path in (self._folder.root / "jobs").glob(f"*/{NAME}"))
        return any((record := read_record(folder)) is not None and not record.outcome for folder in folders)

    def _take_up(self) -> None:
        job = self._current_job()
        if job is None or time.monotonic() < self._not_before or not self._enough_online(job):
            return
        # Read last: it says whether somebody has told the run to stop meanwhile.
        folder = self._folder.job_folder(job)
        record = read_record(folder)
        # Somebody else may have submitted it while the job was read.
        if record is None or record.outcome or self._control.unfinished():
            return
        if record.tries >= len(_PAUSES_SECONDS):
            why = f"its process died {record.tries + 1} times in stage {record.done + 1}; see logs/"
            note_given_up(folder, record, why)
            logger.error("job %s: %s, then `fedgrade resume %s`", job.digest[:16], why, self._folder.root)
            return
        # Before it is submitted: what is submitted may take this process down with it.
        note_try(folder, record)
        self._not_before = time.monotonic() + _PAUSES_SECONDS[record.tries]
        run_id = self._control.submit({RUN_DIRECTORY: str(self._folder.root.resolve())})
        logger.warning("run %d goes on with job %s, whose process was gone", run_id, job.digest[:16])

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
