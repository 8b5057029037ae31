"""``fedgrade stop``: first the folder is told that the run is to stop, then the SuperLink, and then it is seen to end.

The word in the folder is what counts: a SuperLink forgets, and is started again, and who serves takes up what was
interrupted.
"""

from contextlib import suppress

from server.attached import NotServing, attached, wait_for_end
from server.control import ControlRefused
from server.coordinator_folder import CoordinatorFolder
from server.run_record import order_stop, read_record
from server.runs import current_job


def stop_run(folder: CoordinatorFolder) -> str:
    """Stop the run that is on in ``folder``, or was interrupted there; what came of that, in a line.

    Raises:
        NotServing: no SuperLink serves the folder, and nothing in it could be taken up.
        StoreUnavailable: the word could not be written; nothing was stopped.
    """
    job = current_job(folder)
    if job is None:
        return "no run is on"
    where = folder.job_folder(job)
    known = read_record(where)
    is_open = known is not None and not known.outcome
    # Also where a run that is about to begin has no record yet, or that of the process before it.
    if known is None or known.outcome != "released":
        order_stop(where, "by `fedgrade stop`")
    try:
        runs = _stopped_there(folder)
    except (NotServing, ControlRefused):
        # What lies open can be stopped nevertheless: the next SuperLink will not take it up.
        if not is_open:
            raise
        runs = ()
    if not runs and not is_open:
        return "no run is on"
    name = f"run {runs[0]}" if runs else f"job {job.digest[:16]}"
    if not wait_for_end(folder.ledger):
        return f"{name} is stopped; its process has not ended yet, and does so after the stage that is on"
    record = read_record(where)
    if record is not None and record.outcome == "released":
        return f"{name} was released before it could be stopped"
    if not runs:
        return f"{name} had been interrupted; nobody takes it up now but `fedgrade resume {folder.root}`"
    return f"{name} stopped"


def _stopped_there(folder: CoordinatorFolder) -> tuple[int, ...]:
    """What the SuperLink was told to stop."""
    with attached(folder.root) as control:
        runs = control.unfinished()
        for run in runs:
            # One that ended a moment ago is over already.
            with suppress(ControlRefused):
                control.stop(run)
    return runs
