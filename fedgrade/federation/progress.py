"""How far a job is, site by site: what a coordinator's operator watches. All of it is public, none depends on data."""

from dataclasses import dataclass
from typing import Literal

from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import Purpose

Absence = Literal["silent", "resting", "refused", "out"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A stage that is finished.

    Attributes:
        stage: which, counted from 1.
        stages: how many the job has.
        purpose: what was asked for.
        answered: how many sites are in the result.
        participants: how many the job has.
        finished: when, by the coordinator's clock (UTC).
        absent: everybody else. ``silent``: asked in vain. ``resting``: left alone, after it was silent. ``refused``:
            said no to this stage. ``out``: takes no part in the job any more.
    """

    stage: int
    stages: int
    purpose: Purpose
    answered: int
    participants: int
    finished: str
    absent: dict[SiteId, Absence]
