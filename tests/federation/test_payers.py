"""Who pays follows from the ledger: a site that spares a cohort which could pay is found, whatever it signs."""

from dataclasses import replace
from fractions import Fraction

import pytest

from fedgrade.data.manifest import write_manifest
from fedgrade.errors import LedgerBroken
from fedgrade.federation.messages import Admitted, Contribution
from fedgrade.federation.payers import Payers
from fedgrade.federation.site_proof import prove_site
from fedgrade.privacy.accounting import zcdp_epsilon
from fedgrade.privacy.budget import Spending
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from fedgrade.trust.records import AccountKey, DatasetOpened, PlanAccepted, PoissonGaussian, Reserve
from tests.federation.small_federation import (
    DECLARED,
    FIRST,
    NAMES,
    POLICY,
    SmallFederation,
    ask,
    calibrate_once,
    quick_noise,
    told,
    with_privacy,
    write_photos,
)
from tests.trust.small_ledger import EVERY_KIND

SITE = NAMES[0]
OLD, NEW = {"2026": ("manifest.csv", DECLARED)}, {"2027": ("later.csv", DECLARED // 2)}
BOTH = {**OLD, **NEW}
EXACT = replace(POLICY, epsilon_limit=32.0)
CHEAP, DEAR = (with_privacy(target_epsilon=one, evaluation_epsilon=1.0, rounds=1) for one in (10.0, 20.0))


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """One site and three jobs: before new items came in; one in which the old run dry; and one without the old."""
    made = SmallFederation.create(tmp_path_factory.mktemp("payers") / "federation")
    folder = made.folder(SITE)
    photos = write_photos(folder / "later", first=5000)
    for photo in photos:
        (folder / "later" / photo.path).rename(folder / "photos" / photo.path)
    (folder / "later.csv").write_bytes(write_manifest(photos))
    dry = [("centre", 0), ("train", 0), ("train", 1), ("evaluate", 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.job.calibrate", calibrate_once)
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
        asked(made, made.job(CHEAP, nonce="before"), OLD, [("centre", 0), ("train", 0), ("evaluate", 0)])
        asked(made, made.job(DEAR, nonce="dry", declared=DECLARED + DECLARED // 2), BOTH, dry)
        asked(made, made.job(DEAR, nonce="unlisted", declared=DECLARED // 2), NEW, [("evaluate", 0)], POLICY)
    return made


def asked(federation, job, cohorts, questions, policy=EXACT):
    """``job`` at the one site: the ``questions``, each a purpose and an attempt, all of which it answers."""
    with federation.site(policy=policy, cohorts=cohorts) as site:
        assert isinstance(told(federation, site, federation.admission(job)), Admitted)
        for purpose, attempt in questions:
            body = told(federation, site, federation.question(job, ask(purpose, 0, attempt)))
            assert isinstance(body, Contribution)


@pytest.fixture(scope="module")
def bodies(federation):
    return [entry.body for entry in read_ledger(federation.ledger(SITE), key=federation.roster.key_of(SITE))]


@pytest.fixture
def proved(federation, tmp_path):
    """What a ledger of these bodies proves, signed by the site itself."""

    def prove(bodies):
        path = tmp_path / "ledger.jsonl"
        path.unlink(missing_ok=True)
        with LedgerWriter.open(path, key=federation.site_keys[SITE], observe=lambda _: None) as writer:
            for body in bodies:
                writer.append(body, now=FIRST)
        return prove_site(path, site=SITE, roster=federation.roster)

    return prove


def positions(bodies, kind, **values):
    return [
        place
        for place, body in enumerate(bodies)
        if isinstance(body, kind) and all(getattr(body, name) == value for name, value in values.items())
    ]


def changed(bodies, place, **changes):
    return [*bodies[:place], replace(bodies[place], **changes), *bodies[place + 1 :]]


def test_who_pays_is_who_is_within_the_ceiling_by_the_sum_of_rho_alone(bodies, proved):
    """The same rule worked out anew: admitted, and epsilon of all rho charged so far is at most 32."""
    rho, admitted = {}, {}
    seen = []
    for body in bodies:
        if isinstance(body, PlanAccepted):
            admitted[body.job] = body.accounts
        elif isinstance(body, Reserve):
            side = [one for one in admitted[body.job] if one.partition == body.partition]
            after = {one: rho.get(one, Fraction(0)) + body.mechanism.rho for one in side}
            able = {one for one in side if zcdp_epsilon(after[one], delta=body.delta) <= 32.0}
            assert set(body.accounts) == able
            rho |= {one: after[one] for one in able}
            seen.append(sorted(one.cohort for one in able))
    assert ["2026", "2027"] in seen
    assert ["2027"] in seen
    proved(bodies)


def test_a_charge_that_spares_one_of_several_cohorts_is_found(bodies, proved):
    shared = [place for place in positions(bodies, Reserve) if len(bodies[place].accounts) > 1]
    assert {bodies[place].purpose for place in shared} == {"centre", "train", "evaluate"}
    for place in shared:
        for spared in bodies[place].accounts:
            others = tuple(one for one in bodies[place].accounts if one != spared)
            with pytest.raises(LedgerBroken, match=rf"entry {place}: .* spares cohort {spared.cohort}, which was"):
                proved(changed(bodies, place, accounts=others))


def test_a_plan_that_leaves_out_one_side_or_a_whole_cohort_is_found(bodies, proved):
    place = positions(bodies, PlanAccepted)[1]
    accounts = bodies[place].accounts
    assert len(accounts) == 4
    for one in accounts:
        with pytest.raises(
            LedgerBroken, match=rf"entry {place}: leaves out the {one.partition} side of cohort {one.cohort}, which"
        ):
            proved(changed(bodies, place, accounts=tuple(other for other in accounts if other != one)))
    for cohort, left in (("2026", 4), ("2027", 8)):
        rest = tuple(one for one in accounts if one.cohort != cohort)
        said = f"cohorts of {left} declared items to a job that states 12 for this site, and those that could not pay"
        with pytest.raises(LedgerBroken, match=f"entry {place}: admits {said} have 0: a cohort that could was left"):
            proved(changed(bodies, place, accounts=rest))


def test_a_plan_that_names_a_cohort_which_cannot_pay_or_was_not_listed_is_found(bodies, proved):
    (first, both, last) = positions(bodies, PlanAccepted)
    old = {one.partition: one for one in bodies[first].accounts}
    assert {one.cohort for one in bodies[last].accounts} == {"2027"}  # as honest as the others: 2026 is not listed
    with pytest.raises(LedgerBroken, match=rf"entry {last}: account .*/2026/train: epsilon would reach"):
        proved(changed(bodies, last, accounts=(*bodies[last].accounts, old["train"], old["test"])))
    with pytest.raises(LedgerBroken, match=rf"entry {last}: admits cohorts of 12 .* states 4 .* not listed"):
        proved(changed(bodies, last, accounts=(*bodies[last].accounts, old["test"])))
    with pytest.raises(LedgerBroken, match=rf"entry {both}: admits an account twice"):
        proved(changed(bodies, both, accounts=(*bodies[both].accounts, old["test"])))


ACCOUNT = AccountKey(partner=SITE, lineage="squares", cohort="2026", partition="train")


def test_a_cohort_that_cannot_express_a_charge_is_as_exhausted_as_one_beyond_its_ceiling():
    """An account of integer noise alone has no epsilon for Poisson steps; another cohort may still train on."""
    reserves = (body for body in EVERY_KIND if isinstance(body, Reserve))
    poisson = next(body.mechanism for body in reserves if isinstance(body.mechanism, PoissonGaussian))
    other = replace(ACCOUNT, cohort="2027")
    dataset = DatasetOpened(
        lineage="squares", cohort="2026", unit="item", adjacency="add_or_remove_one", photos_per_item=1,
        declared_items=8, manifest_commitment="0" * 64, composition="zcdp", epsilon_limit=Fraction(50),
        delta=Fraction(1, 10**5),
    )  # fmt: skip
    charge = Reserve(
        job="0" * 64, round_index=0, attempt=0, purpose="train", accounts=(other,), mechanism=poisson,
        weights_digest="0" * 64, epsilon_limit=Fraction(50), delta=Fraction(1, 10**5),
    )  # fmt: skip
    datasets = {("squares", "2026"): dataset}
    payers = Payers(site=SITE, datasets=datasets, spending={ACCOUNT: Spending()})
    payers.require_nobody_spared(charge, admitted=(ACCOUNT, other))
    datasets["squares", "2026"] = replace(dataset, composition="mixed")
    with pytest.raises(LedgerBroken, match="spares cohort 2026"):
        payers.require_nobody_spared(charge, admitted=(ACCOUNT, other))
