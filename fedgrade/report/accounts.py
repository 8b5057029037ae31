"""Lifetime accounts: what each may spend, what it has spent, and what was spent for nothing."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from fedgrade.federation.site_proof import AccountProof, SiteProof
from fedgrade.federation.verification import FederationProof
from fedgrade.privacy.budget import Spending
from fedgrade.report.figures import MAX_BARS, BudgetBar, SpendingLine
from fedgrade.report.observers import account_bound
from fedgrade.report.words import delta_text, epsilon_text, limit_text, plain, rho_text, share_text
from fedgrade.trust.records import AccountKey, Partition

_SIDES: dict[Partition, str] = {"train": "training items", "test": "held-out items"}


@dataclass(frozen=True, kw_only=True)
class AccountRow:
    """One account; texts, ready to print."""

    site: str
    data: str
    side: str
    cost: str
    used: str
    ceiling: str
    share: str
    delta: str
    true_positives: str


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    """What became of one site's charges: used by the coordinator, or paid for nothing."""

    site: str
    charged: int
    used: int
    unused: int
    aborted: int
    open: int


@dataclass(frozen=True, kw_only=True)
class CorrectionRow:
    """Something that a partner put on record as spent and not charged."""

    site: str
    data: str
    entry: str
    cost: str
    reason: str


def correction_rows(proof: FederationProof) -> tuple[CorrectionRow, ...]:
    """Every correction of every site."""
    return tuple(
        CorrectionRow(
            site=site.site,
            data=f"{plain(one.account.lineage)} / {plain(one.account.cohort)}, {_SIDES[one.account.partition]}",
            entry=f"{sequence:,}",
            cost=rho_text(one.rho),
            reason=plain(one.reason),
        )
        for _, site in sorted(proof.sites.items())
        for sequence, one in site.corrections.items()
    )


def account_rows(proof: FederationProof) -> tuple[AccountRow, ...]:
    """Every account of every site, training side first."""
    return tuple(_account_row(site, key, account) for site, key, account in _accounts(proof))


def attempt_rows(proof: FederationProof) -> tuple[AttemptRow, ...]:
    """What became of every site's charges.

    A receipt that the coordinator counted stands in the site's ledger as a commit, one a stage; the verification has
    checked that, so commits beyond the receipts were computed and then not used.
    """
    counted = Counter(site for job in proof.jobs.values() for closed in job.rounds for site in closed.receipts)
    return tuple(_attempt_row(site, used=counted[site.site]) for _, site in sorted(proof.sites.items()))


def budget_of(proof: FederationProof) -> tuple[BudgetBar, ...]:
    """The bars to draw: all accounts, or those nearest to their ceilings if there are too many."""
    everyone = tuple(_accounts(proof))
    if len(everyone) > MAX_BARS:
        everyone = tuple(sorted(everyone, key=lambda one: -one[2].epsilon / float(one[2].dataset.epsilon_limit)))
    return tuple(
        BudgetBar(
            label=_label(proof.sites[key.partner], key),
            training=key.partition == "train",
            used=account.epsilon,
            ceiling=float(account.dataset.epsilon_limit),
        )
        for _, key, account in everyone[:MAX_BARS]
    )


def spending_of(proof: FederationProof) -> tuple[SpendingLine, ...]:
    """Epsilon of every training account after each of its charges."""
    lines = []
    for _, key, _ in _accounts(proof):
        charges = proof.sites[key.partner].charges_to(key)
        if key.partition == "train":
            lines.append(
                SpendingLine(
                    label=_label(proof.sites[key.partner], key),
                    epsilons=tuple(charge.epsilon_after(key) for charge in charges),
                    ceilings=tuple(float(charge.reserve.epsilon_limit) for charge in charges),
                )
            )
    return tuple(lines)


def fullest(proof: FederationProof) -> tuple[AccountKey, AccountProof] | None:
    """The account with the largest epsilon, over all jobs."""
    accounts = [(key, account) for _, key, account in _accounts(proof)]
    return max(accounts, key=lambda one: one[1].epsilon, default=None)


def nearest_to_ceiling(proof: FederationProof) -> tuple[AccountKey, AccountProof] | None:
    """The account that has used the largest part of what it may ever use."""
    accounts = [(key, account) for _, key, account in _accounts(proof)]
    return max(accounts, key=lambda one: one[1].epsilon / float(one[1].dataset.epsilon_limit), default=None)


def _accounts(proof: FederationProof) -> Iterator[tuple[str, AccountKey, AccountProof]]:
    for site, ledger in sorted(proof.sites.items()):
        ordered = sorted(ledger.accounts, key=lambda key: (key.lineage, key.cohort, key.partition != "train"))
        for key in ordered:
            yield site, key, ledger.accounts[key]


def _account_row(site: str, key: AccountKey, account: AccountProof) -> AccountRow:
    dataset = account.dataset
    bound = account_bound(account.spending, account.epsilon, delta=dataset.delta)
    return AccountRow(
        site=site,
        data=f"{plain(key.lineage)} / {plain(key.cohort)}",
        side=_SIDES[key.partition],
        cost=_cost(account.spending),
        used=epsilon_text(account.epsilon),
        ceiling=limit_text(dataset.epsilon_limit),
        share=share_text(account.epsilon / float(dataset.epsilon_limit)),
        delta=delta_text(dataset.delta),
        true_positives=share_text(bound.true_positive_rate),
    )


def _cost(spending: Spending) -> str:
    steps = sum(paid.planned_steps for paid in spending.poisson)
    exact = rho_text(spending.rho)
    return f"{exact}, {steps:,} DP-SGD steps" if steps else exact


def _attempt_row(site: SiteProof, *, used: int) -> AttemptRow:
    outcomes = Counter(charge.outcome for charge in site.charges.values())
    return AttemptRow(
        site=site.site,
        charged=len(site.charges),
        used=used,
        unused=outcomes["committed"] - used,
        aborted=outcomes["aborted"],
        open=outcomes["open"],
    )


def _label(site: SiteProof, key: AccountKey) -> str:
    """The site's name, and the data's where it has more than one."""
    data = {(one.lineage, one.cohort) for one in site.accounts}
    return site.site if len(data) == 1 else plain(f"{site.site} {key.lineage}/{key.cohort}")
