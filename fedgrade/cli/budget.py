"""``fedgrade budget``: what the accounts in ledgers have used, have left, and would have after one more job.

Needs the base install alone. Nothing is believed before it was verified, and no ledger is locked or written.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fedgrade.errors import BudgetExceeded, DocumentRefused, FedgradeError, PlanRefused
from fedgrade.federation.site_proof import AccountProof, Charge, SiteProof, prove_site
from fedgrade.federation.verification import verify_federation
from fedgrade.job import TrainingJob
from fedgrade.privacy.accounting import printed
from fedgrade.privacy.budget import Ceiling, require_within
from fedgrade.trust.identity import Roster, read_roster
from fedgrade.trust.ledger import read_ledger
from fedgrade.trust.records import AccountKey

BAR_WIDTH = 20  # characters
_LEAST_WIDTH = 140  # columns of a table; a narrower terminal folds lines, but loses nothing
_MAX_NAME = 60  # characters of a name that a partner chose


@click.command(epilog="Example: fedgrade budget runs/federation")
@click.argument("paths", metavar="PATH...", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--roster", type=click.Path(path_type=Path, dir_okay=False), help="The roster you trust.")
def budget(paths: tuple[Path, ...], roster: Path | None) -> None:
    """List the lifetime accounts in each PATH, verified: the folder of a federation, or one site's ledger file.

    A folder's own roster is used where none is given; a ledger alone needs --roster to say whose key must sign it.
    """
    console, trusted = plain_console(), None if roster is None else read_roster(roster)
    for path in paths:
        sites = _proofs(path, trusted)
        console.print(_table(sites, title=f"Privacy budgets of {shown_name(str(path))}, epsilon per item"))
        for line in _corrections(sites):
            console.print(line)
    if trusted is None:
        console.print("The roster came from the folder itself; compare its keys with ones you trust, or give --roster.")


def plain_console() -> Console:
    """Standard output, read by nobody as markup: the names in it are other people's."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.width = max(console.width, _LEAST_WIDTH)
    return console


def bar(used: float, after: float, *, ceiling: float) -> str:
    """What is used (full), what is about to be (shaded) and what is left of ``ceiling``; an arrow if it is passed."""
    solid, reached = (min(BAR_WIDTH, round(BAR_WIDTH * part / ceiling)) for part in (used, min(after, 2 * ceiling)))
    return "█" * solid + "▒" * (reached - solid) + "·" * (BAR_WIDTH - reached) + ("→" if after > ceiling else "")


def _proofs(path: Path, roster: Roster | None) -> list[SiteProof]:
    if path.is_dir():
        proof = verify_federation(path, roster=roster)
        return [ledger for _, ledger in sorted(proof.sites.items())]
    if roster is None:
        raise DocumentRefused(f"{path}: a ledger alone does not say whose key must sign it; give --roster")
    return [_prove_ledger(path, roster)]


def _prove_ledger(path: Path, roster: Roster) -> SiteProof:
    """The ledger at ``path`` proved for the site whose key signs it; the file's name decides nothing."""
    refused: FedgradeError | None = None
    for site, key in roster.sites.items():
        try:
            next(read_ledger(path, key=key), None)
        except FedgradeError as error:
            refused = error
            continue
        return prove_site(path, site=site, roster=roster)
    raise DocumentRefused(f"{path}: its first entry is signed by no site of the roster ({refused})") from refused


def _table(sites: list[SiteProof], *, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("account", overflow="fold")
    for heading in ("used", "", "ceiling", "left", "delta", "jobs", "charges", "for nothing", "after one more"):
        table.add_column(heading, no_wrap=True)
    for site in sites:
        for key, account in _ordered(site):
            table.add_row(*_cells(site, key, account))
    if not table.row_count:
        table.add_row("nothing was charged yet")
    return table


def _corrections(sites: list[SiteProof]) -> Iterator[str]:
    """What partners put on record as spent and not charged, a line each."""
    for site in sites:
        for sequence, correction in site.corrections.items():
            account = correction.account
            name = shown_name(f"{site.site}/{account.lineage}/{account.cohort}/{account.partition}")
            yield (
                f"Corrected by entry {sequence}: {name} spent rho {float(correction.rho):.4g} more; {correction.reason}"
            )


def _ordered(site: SiteProof) -> Iterator[tuple[AccountKey, AccountProof]]:
    yield from sorted(
        site.accounts.items(), key=lambda one: (one[0].lineage, one[0].cohort, one[0].partition != "train")
    )


def _cells(site: SiteProof, key: AccountKey, account: AccountProof) -> Iterator[str]:
    charges = site.charges_to(key)
    ceiling = float(account.dataset.epsilon_limit)
    yield shown_name(f"{site.site}/{key.lineage}/{key.cohort}/{key.partition}")
    yield printed(account.epsilon)
    yield bar(account.epsilon, account.epsilon, ceiling=ceiling)
    yield f"{ceiling:.2f}"
    yield left(account.epsilon, ceiling=account.dataset.epsilon_limit)
    yield f"{float(account.dataset.delta):g}"
    yield str(len({charge.reserve.job for charge in charges}))
    yield str(len(charges))
    yield str(waste(charges))
    yield one_more(key, account, job=site.jobs[charges[-1].reserve.job]) if charges else "nothing ran yet"


def left(used: float, *, ceiling: Fraction) -> str:
    """What ``ceiling`` leaves above ``used``, rounded down as that is rounded up; nothing where it is passed."""
    if used > ceiling:
        return printed(0.0)
    hundredths = math.floor((ceiling - Fraction(printed(used))) * 100)
    return printed(max(0, hundredths) / 100)


def waste(charges: Sequence[Charge]) -> str:
    """How many of ``charges``, in the ledger's order, bought nothing, and why: each is counted once.

    Aborted: given up before anything left. Open: neither finished nor given up; the site crashed, or is at it now.
    Asked again: finished, and then the same round was charged anew, because the reply was lost or refused.
    """
    last = {_round(charge): charge for charge in charges}
    reasons = Counter(
        {"aborted": "aborted", "open": "open"}.get(charge.outcome, "asked again")
        for charge in charges
        if charge.outcome != "committed" or last[_round(charge)] is not charge
    )
    detail = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    return f"{reasons.total()} ({detail})" if reasons else "0"


def one_more(key: AccountKey, account: AccountProof, *, job: TrainingJob) -> str:
    """What ``account`` would come to after a job like ``job``, and whether its ceiling allows that."""
    charge = job.plan.charge_training if key.partition == "train" else job.plan.charge_evaluation
    ceiling = Ceiling(
        epsilon=account.dataset.epsilon_limit, delta=account.dataset.delta, composition=account.dataset.composition
    )
    after = charge(account.spending, job=f"one more like {job.digest}")
    try:
        epsilon = printed(after.epsilon(delta=ceiling.delta, composition=ceiling.composition))
        require_within(after, ceiling=ceiling, account=key)
    except BudgetExceeded:
        return f"{epsilon}, refused"
    except PlanRefused:
        return "refused: its delta is shared out among too many jobs"
    return f"{epsilon}, fits"


def _round(charge: Charge) -> tuple[str, str, int]:
    return charge.reserve.job, charge.reserve.purpose, charge.reserve.round_index


def shown_name(text: str) -> str:
    """A name that someone else chose, on one line and without characters that steer a terminal."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= _MAX_NAME else shown[: _MAX_NAME - 1] + "…"
