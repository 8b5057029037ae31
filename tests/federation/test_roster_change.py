"""A roster changes while a site runs: who came may take part, who left is not asked any more, and jobs go on."""

from dataclasses import replace

import pytest

from fedgrade.errors import SignatureRefused
from fedgrade.federation.messages import Admitted, Contribution
from fedgrade.trust.identity import SigningKey
from tests.federation.small_federation import NAMES, ask, refusal

SITE, OTHER = NAMES[0], NAMES[1]
pytestmark = pytest.mark.usefixtures("quiet")


def without(roster, *sites):
    return replace(roster, sites={site: key for site, key in roster.sites.items() if site not in sites})


def body(federation, site, question):
    return federation.opened(site.answer(question)).document.body


def test_a_job_that_was_admitted_goes_on_when_somebody_left_and_the_next_one_without_it_is_expected(
    federation, admitted, job
):
    admitted.take_roster(without(federation.roster, OTHER))
    assert isinstance(body(federation, admitted, federation.question(job, ask("centre"))), Contribution)
    code, reason = refusal(federation, admitted, federation.admission(federation.job(nonce="next")))
    assert code == "policy"
    assert f"participant {OTHER} is not on this site's roster" in reason
    admitted.take_roster(federation.roster)
    assert isinstance(body(federation, admitted, federation.admission(federation.job(nonce="next"))), Admitted)


def test_a_job_that_was_admitted_goes_on_after_a_restart_too(federation, job):
    with federation.site() as site:
        site.answer(federation.admission(job))
    with federation.site() as site:
        site.take_roster(without(federation.roster, OTHER))
        assert isinstance(body(federation, site, federation.question(job, ask("centre"))), Contribution)


def test_a_roster_that_makes_somebody_else_of_this_site_or_its_coordinator_is_not_taken(federation, admitted, job):
    stranger = SigningKey.generate().public
    for roster, said in (
        (replace(federation.roster, coordinator=stranger), "another coordinator"),
        (replace(federation.roster, sites={**federation.roster.sites, SITE: stranger}), "another key than its own"),
        (without(federation.roster, SITE), "not on the roster"),
    ):
        with pytest.raises(SignatureRefused, match=said):
            admitted.take_roster(roster)
    assert isinstance(body(federation, admitted, federation.question(job, ask("centre"))), Contribution)
