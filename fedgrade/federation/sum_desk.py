"""A site's place at secure sums: what it is asked, held against its own copy of the sealed job and its own policy."""

from fedgrade.aggregation.secure_sum.documents import SumCommitments, SumProposal, SumSurvivors, SumVotes
from fedgrade.aggregation.secure_sum.site import MaskedUpload, SumSite
from fedgrade.errors import AttemptOver, MessageRefused
from fedgrade.federation.charging import Ask
from fedgrade.federation.policy import Policy
from fedgrade.federation.releases import IntArray
from fedgrade.federation.sum_task import sum_floor, sum_task, sums
from fedgrade.job import TrainingJob
from fedgrade.trust.identity import Roster, SigningKey, SiteId


class SumDesk:
    """One attempt after another; called by one thread at a time.

    Attributes:
        job: whose sum this site committed to last; None if that was given up, or a restart forgot it.
    """

    def __init__(self, *, site: SiteId, key: SigningKey, roster: Roster) -> None:
        self.job: TrainingJob | None = None
        self._sums = SumSite(site=site, key=key, roster=roster)

    def take_roster(self, roster: Roster) -> None:
        """Hold what others sign against ``roster`` from here on."""
        self._sums.take_roster(roster)

    def share_key(self, job: TrainingJob) -> str:
        """What other sites encrypt shares under, signed; empty unless sums of ``job`` tolerate dropouts."""
        return self._sums.announce(job.digest).decode() if job.spec.aggregation.tolerate_dropouts else ""

    def commit(self, job: TrainingJob, ask: Ask, proposal: SumProposal, *, policy: Policy) -> str:
        """This site's signed commitment to the terms that were proposed.

        Raises:
            MessageRefused: ``job`` has no secure sums, or the terms are not those that follow from it.
            PolicyViolated: the set is too small, or brings too little noise.
            SignatureRefused: somebody in the set is not on this site's roster.
            AttemptOver: a further attempt is needed.
        """
        if not sums(job):
            raise MessageRefused(f"job {job.spec.name}: adds nothing up under masks; aggregation.method is mean")
        terms = proposal.terms
        if strangers := sorted(set(terms.participants) - set(job.participants)):
            raise MessageRefused(f"secure sum: {strangers[0]} does not take part in job {job.spec.name}")
        # What the weights will be is checked when they come: then they must be these.
        promised = terms.task.weights_digest
        task = sum_task(job, ask, weights_digest=promised, participants=len(terms.participants))
        commitment = self._sums.commit(proposal, task=task, floor=sum_floor(job, policy)).decode()
        self.job = job
        return commitment

    def confirm(
        self, job: TrainingJob, ask: Ask, commitments: SumCommitments | None, *, weights_digest: str
    ) -> str | None:
        """The transcript of the attempt that everybody agreed on; nothing where releases leave as they are.

        Raises:
            MessageRefused: commitments are missing, too many or to something else, or the weights are others than
                everybody was promised.
            SignatureRefused: a commitment is not by the identity on this site's own roster.
            AttemptOver: this site is not committed to this attempt; a restart forgets that.
        """
        if not sums(job):
            if commitments is not None:
                raise MessageRefused(f"job {job.spec.name}: comes with commitments, and adds nothing up under masks")
            return None
        if commitments is None:
            raise MessageRefused(f"job {job.spec.name}: releases leave under masks alone, and no commitments came")
        task = self._sums.task
        if task is None or (task.job, task.purpose, task.round_index, task.attempt) != (
            ask.job,
            ask.purpose,
            ask.round_index,
            ask.attempt,
        ):
            raise AttemptOver(
                f"{ask.purpose} round {ask.round_index} attempt {ask.attempt}: this site is not committed to it; begin "
                "a further attempt"
            )
        if task.weights_digest != weights_digest:
            raise MessageRefused("weights: are not those that every site of this attempt was promised")
        return self._sums.confirm(commitments).transcript

    def mask(self, release: IntArray) -> MaskedUpload:
        """``release`` [numbers] under the masks of the attempt that was confirmed; once."""
        return self._sums.mask(release)

    def vote(self, survivors: SumSurvivors) -> str:
        """This site's signed vote for ``survivors``."""
        return self._sums.vote(survivors).decode()

    def reveal(self, votes: SumVotes) -> str:
        """The shares that let the total of those who voted be read, signed."""
        return self._sums.reveal(votes).decode()

    def forget(self) -> None:
        """Give the attempt up; its secrets are overwritten."""
        self.job = None
        self._sums.forget()
