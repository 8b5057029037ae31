"""The run of the job that lies in a coordinator's folder. The same for a deployment, a simulation, a process."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from fedgrade.errors import LedgerUnavailable
from fedgrade.federation.exchange import Cohort, Watch, unwatched
from fedgrade.federation.membership import with_former
from fedgrade.federation.progress import Progress
from fedgrade.federation.rounds import Coordinator, RoundLog, run_job
from fedgrade.federation.store import Below, Documents, RunStore
from fedgrade.federation.witness import Witness
from fedgrade.trust.identity import Roster, SigningKey, SiteId
from fedgrade.trust.ledger import Entry, LedgerWriter
from server import progress_file
from server.coordinator_folder import WITNESSED, CoordinatorFolder
from server.enrolment import LedgerEntries, read_book
from server.mirror import EVERYTHING
from server.nodes_file import version
from server.run_now import RefusalsFile
from server.run_record import recorded

logger = logging.getLogger(__name__)

# An enrolment or a revocation holds the ledger for a moment, and a run that was stopped until it notices.
_LEDGER_TRIES, _LEDGER_RETRY_SECONDS = 120, 0.25


def coordinate(run_directory: Path, cohort: Cohort, *, watch: Watch = unwatched) -> None:
    """Run the job that lies in ``run_directory`` to its release, from wherever its checkpoint stands."""
    run_folder(CoordinatorFolder(root=run_directory), cohort, report=lambda _: None, watch=watch)


def run_folder(
    folder: CoordinatorFolder, cohort: Cohort, *, report: Callable[[Progress], None], watch: Watch = unwatched
) -> str:
    """Run the job in ``folder`` with ``cohort``; returns the digest of the signed release.

    In pauses between questions ``watch`` is told who is waited for.

    Each finished stage is written into the folder, for whoever watches, and then given to ``report``. Between stages,
    sites that were enrolled or revoked meanwhile are entered into the ledger, which the run holds.
    """
    with folder.kept(copies=EVERYTHING) as kept:
        return _run_kept(folder, kept, cohort, report=report, watch=watch)


def _run_kept(
    folder: CoordinatorFolder, kept: Documents, cohort: Cohort, *, report: Callable[[Progress], None], watch: Watch
) -> str:
    job, key, entries = folder.read_job(), SigningKey.load(folder.key), LedgerEntries(folder)
    patience = folder.read_patience()
    writers: list[LedgerWriter] = []

    def open_ledger(observe: Callable[[Entry], None]) -> LedgerWriter:
        def look(entry: Entry) -> None:
            observe(entry)
            entries.observe(entry)

        writers.append(_opened(folder, key, observe=look))
        return writers[0]

    log = RoundLog.open(open_ledger, now=datetime.now(UTC))
    # From here on the ledger is held, so that nobody else writes into the folder.
    with closing(log), recorded(folder.job_folder(job), job) as keeper:

        def report_and_enter(progress: Progress) -> None:
            entries.complete(writers[0], now=datetime.now(UTC))
            progress_file.append(folder.progress, progress)
            keeper.stage(progress.stage)
            report(progress)

        entries.complete(writers[0], now=datetime.now(UTC))
        coordinator = Coordinator(
            key=key,
            witness=Witness(Below(documents=kept, folder=WITNESSED), roster=_known(folder)),
            clock=lambda: datetime.now(UTC),
            report=report_and_enter,
            hear=RefusalsFile(folder.progress.parent).hears,
            watch=watch,
            revoked=_Revoked(folder),
            deadline_seconds=patience.deadline_seconds,
            admission_seconds=patience.admission_seconds,
        )
        store = RunStore(Below(documents=kept, folder=folder.job_name(job)), key=key)
        return run_job(job, cohort, coordinator=coordinator, store=store, log=log)


class _Revoked:
    """Who was revoked by now; the book is read again only when it is another one."""

    def __init__(self, folder: CoordinatorFolder) -> None:
        self._folder = folder
        self._seen: object = None
        self._sites: frozenset[SiteId] = frozenset()

    def __call__(self) -> frozenset[SiteId]:
        """The sites.

        Raises:
            DocumentRefused, SignatureRefused: the book cannot be believed.
        """
        if self._folder.book.exists() and (seen := version(self._folder.book)) != self._seen:
            self._sites, self._seen = frozenset(read_book(self._folder).membership.former), seen
        return self._sites


def _known(folder: CoordinatorFolder) -> Roster:
    """The roster, and the keys of sites that were revoked: a job that is resumed may still hold their receipts."""
    roster = folder.read_roster()
    return with_former(roster, read_book(folder).membership) if folder.book.exists() else roster


def _opened(folder: CoordinatorFolder, key: SigningKey, *, observe: Callable[[Entry], None]) -> LedgerWriter:
    """The ledger, waited for while a command enters a site into it."""
    for _ in range(_LEDGER_TRIES):
        try:
            return LedgerWriter.open(folder.ledger, key=key, observe=observe)
        except LedgerUnavailable as error:
            logger.info("%s", error)
            time.sleep(_LEDGER_RETRY_SECONDS)
    return LedgerWriter.open(folder.ledger, key=key, observe=observe)
