"""What was spent and not charged goes on record, counts for life, and is shown to whoever reads the ledger."""

from dataclasses import replace
from fractions import Fraction

import pytest

from fedgrade.errors import DocumentRefused, LedgerBroken
from fedgrade.federation.charging import Charging
from fedgrade.federation.messages import Refusal
from fedgrade.federation.site_proof import prove_site
from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.trust.ledger import LedgerWriter
from fedgrade.trust.records import AccountKey, Correction
from tests.federation.small_federation import NAMES, POLICY, with_privacy

SITE = NAMES[0]
ACCOUNT = AccountKey(partner=SITE, lineage=f"squares-{SITE}", cohort="2026", partition="train")
RHO = Fraction(3, 7)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def trained(federation):
    federation.run_in_process(federation.job(with_privacy(rounds=1)))
    return federation


def correct(federation, account=ACCOUNT, rho=RHO, reason="the clip was off"):
    with Charging.open(
        federation.ledger(SITE), site=SITE, key=federation.site_keys[SITE], clock=federation.clock
    ) as charging:
        return charging.correct(account, rho=rho, reason=reason)


def proved(federation):
    return prove_site(federation.ledger(SITE), site=SITE, roster=federation.roster)


def test_a_correction_adds_exactly_its_cost_to_its_own_account(trained):
    before = proved(trained)
    epsilon = correct(trained)
    after = proved(trained)
    rho = before.accounts[ACCOUNT].spending.rho + RHO
    assert after.accounts[ACCOUNT].spending.rho == rho
    assert after.accounts[ACCOUNT].epsilon == epsilon == zcdp_epsilon(rho, delta=Fraction(1, 10**5))
    other = replace(ACCOUNT, partition="test")
    assert after.accounts[other] == before.accounts[other]
    ((_, correction),) = after.corrections.items()
    assert correction == Correction(account=ACCOUNT, rho=RHO, reason="the clip was off")


def test_an_account_that_a_correction_takes_past_its_ceiling_pays_for_nothing_more(trained):
    correct(trained, rho=Fraction(100))
    assert proved(trained).accounts[ACCOUNT].epsilon > POLICY.epsilon_limit
    with trained.site() as site:
        body = trained.opened(site.answer(trained.admission(trained.job(nonce="next")))).document.body
    assert isinstance(body, Refusal)
    assert body.code == "budget"


@pytest.mark.parametrize("rho", [Fraction(0), Fraction(-1, 10)])
def test_nothing_is_ever_given_back(trained, rho):
    before = trained.ledger(SITE).read_bytes()
    with pytest.raises(DocumentRefused, match="never given back"):
        correct(trained, rho=rho)
    assert trained.ledger(SITE).read_bytes() == before


def test_what_was_never_under_account_cannot_be_corrected(trained):
    with pytest.raises(LedgerBroken, match="is not under account; known: squares-recycler-a/2026"):
        correct(trained, account=replace(ACCOUNT, cohort="1999"))


@pytest.mark.parametrize(
    ("account", "line"),
    [
        (replace(ACCOUNT, partner=NAMES[1]), "corrects an account of recycler-b"),
        (replace(ACCOUNT, cohort="1999"), "which was never put under account"),
    ],
)
def test_a_correction_of_somebody_else_s_account_breaks_a_ledger(trained, account, line):
    key = trained.site_keys[SITE]
    with LedgerWriter.open(trained.ledger(SITE), key=key, observe=lambda _: None) as writer:
        writer.append(Correction(account=account, rho=RHO, reason="none"), now=trained.clock())
    with pytest.raises(LedgerBroken, match=line):
        proved(trained)
