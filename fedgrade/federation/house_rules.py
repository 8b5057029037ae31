"""The partner's rules as they stand now: its policy file, read again at every request, its clock, its people."""

import logging
from collections.abc import Callable
from datetime import datetime

from fedgrade.errors import DocumentRefused, SiteWaits
from fedgrade.federation.approvals import Approvals
from fedgrade.federation.policy import Policy, require_open
from fedgrade.job import TrainingJob

logger = logging.getLogger(__name__)


class HouseRules:
    """What a partner allows at this moment. A changed policy file counts from the next request on, without a restart.

    A file that cannot be read stops everything until it can: an old policy is nobody's last word.
    """

    def __init__(
        self, policy: Callable[[], Policy], *, approvals: Approvals, local_time: Callable[[], datetime]
    ) -> None:
        self._policy = policy
        self._approvals = approvals
        self._local_time = local_time

    def now(self) -> Policy:
        """The policy, if this site answers at this hour.

        Raises:
            SiteWaits: it does not, or the policy cannot be read.
        """
        try:
            policy = self._policy()
        except DocumentRefused as error:
            logger.error("nothing is answered until the policy can be read: %s", error)  # noqa: TRY400 - a line says it
            raise SiteWaits("this site's policy cannot be read; its own operator can see why in its log") from error
        require_open(policy, self._local_time().time())
        return policy

    def require_approved(self, policy: Policy, job: TrainingJob, envelope: str) -> None:
        """Return if ``job`` needs nobody's approval, or has it.

        Raises:
            SiteWaits: nobody has decided yet.
            PolicyViolated: it was declined, or too many jobs wait already.
            LedgerUnavailable: the question could not be written down.
        """
        if policy.approval:
            self._approvals.require(job, envelope)
