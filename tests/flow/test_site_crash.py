"""A power cut at every line from request to reply: what was charged stays charged, and nothing is released twice."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from fedgrade.federation import site as site_module
from fedgrade.federation.charging import Charging
from fedgrade.federation.messages import Contribution
from fedgrade.federation.outbox import Outbox
from fedgrade.federation.site_proof import prove_site
from fedgrade.trust.records import Commit
from tests.federation.small_federation import NAMES, ask

SITE = NAMES[0]
pytestmark = pytest.mark.usefixtures("quick")


class PowerCut(BaseException):
    """The process is gone: no handler of the site's own may run."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of ``Site._contribute``, and what must be true after a power cut there."""

    owner: object
    name: str
    after: bool
    charged: bool
    kept: bool = False

    def __str__(self):
        return f"{'after' if self.after else 'before'} {self.name}"

    @contextmanager
    def cut(self):
        """The power goes at this line, whatever the block does next."""
        real = getattr(self.owner, self.name)

        def line(*arguments, **named):
            if self.after:
                real(*arguments, **named)
            raise PowerCut

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.owner, self.name, line)
            with pytest.raises(PowerCut):
                yield


LINES = [
    Line(owner=site_module, name="read_head", after=False, charged=False),
    Line(owner=Charging, name="require_fresh", after=True, charged=False),
    Line(owner=Charging, name="reserve", after=False, charged=False),
    Line(owner=Charging, name="reserve", after=True, charged=True),
    Line(owner=site_module, name="compute_release", after=False, charged=True),
    Line(owner=site_module, name="compute_release", after=True, charged=True),
    Line(owner=Charging, name="commit", after=False, charged=True),
    Line(owner=Charging, name="commit", after=True, charged=True),
    Line(owner=Outbox, name="keep", after=False, charged=True),
    Line(owner=Outbox, name="keep", after=True, charged=True, kept=True),
]


@pytest.mark.parametrize("purpose", ["centre", "train", "evaluate"])
@pytest.mark.parametrize("line", LINES, ids=str)
def test_after_a_power_cut_the_charge_stands_if_it_was_on_disk_and_the_next_attempt_works(federation, line, purpose):
    job = federation.job()
    question, further = (federation.question(job, ask(purpose, 0, attempt)) for attempt in range(2))
    with federation.site() as site:
        site.answer(federation.admission(job))
        with line.cut():
            site.answer(question)

    prove_site(federation.ledger(SITE), site=SITE, roster=federation.roster)
    assert len(federation.charges(SITE)) == line.charged
    with federation.site() as site:
        again = federation.opened(site.answer(question)).document.body
        if not line.charged or line.kept:
            assert isinstance(again, Contribution)
            assert len(federation.charges(SITE)) == 1
        else:
            assert (again.kind, again.code) == ("refusal", "spent")
            assert isinstance(federation.opened(site.answer(further)).document.body, Contribution)
            assert len(federation.charges(SITE)) == 2

    proof = prove_site(federation.ledger(SITE), site=SITE, roster=federation.roster)
    commits = [entry.body for entry in federation.entries(SITE) if isinstance(entry.body, Commit)]
    assert len({(each.purpose, each.round_index, each.attempt) for each in commits}) == len(commits)
    assert len(proof.charges) == len(federation.charges(SITE))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Charging, "open_dataset"), (Charging, "accept"), (Charging, "witness"), (site_module, "open_sealed")],
)
@pytest.mark.parametrize("after", [False, True])
def test_after_a_power_cut_during_admission_the_job_can_be_shown_again(federation, owner, name, after):
    job = federation.job()
    with federation.site() as site, Line(owner=owner, name=name, after=after, charged=False).cut():
        site.answer(federation.admission(job))
    with federation.site() as site:
        assert federation.opened(site.answer(federation.admission(job))).document.body.kind == "admitted"
    kinds = [entry.body.kind for entry in federation.entries(SITE)]
    assert kinds == ["genesis", "dataset", "plan", "checkpoint"]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_reservation_torn_in_the_middle_was_never_made(federation, share):
    job, ledger = federation.job(), federation.ledger(SITE)
    question = federation.question(job, ask("train"))
    with federation.site() as site:
        site.answer(federation.admission(job))
        whole = ledger.stat().st_size
        with LINES[3].cut():
            site.answer(question)
    with ledger.open("r+b") as file:
        file.truncate(whole + int(share * (ledger.stat().st_size - whole)))
    with federation.site() as site:
        assert federation.opened(site.answer(question)).document.body.kind == "contribution"
    assert len(federation.charges(SITE)) == 1


def test_every_line_named_here_is_one_that_the_site_runs():
    assert all(callable(getattr(line.owner, line.name)) for line in LINES)
