"""What a site is at, in words for its own operator. Nothing of it is ever sent to a coordinator."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedgrade.trust.records import AccountKey, Partition

if TYPE_CHECKING:
    # Whoever only reads a status should not wait for accountants.
    from fedgrade.federation.charging import Charging

_SIDES: tuple[Partition, ...] = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Activity:
    """The job asked about last, where in it, and the last refusal in full; empty before the first of each."""

    job: str = ""
    stage: str = ""
    refusal: str = ""


@dataclass(frozen=True, kw_only=True)
class AccountStanding:
    """What is spent of one account, and the partner's ceiling on it."""

    account: AccountKey
    epsilon: float
    ceiling: float


def standings_of(charging: "Charging") -> tuple[AccountStanding, ...]:
    """Every account in a site's ledger: each side of each cohort."""
    return tuple(
        AccountStanding(
            account=account,
            epsilon=charging.spending(account).epsilon(delta=dataset.delta, composition=dataset.composition),
            ceiling=float(dataset.epsilon_limit),
        )
        for dataset in charging.datasets
        for account in (charging.account(dataset, partition=side) for side in _SIDES)
    )
