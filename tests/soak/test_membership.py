"""Membership attacks on heads trained on real photos, against what the claim allows any attack.

No evidence against the claim is what this can find at best: it is one attack, on one data set. That the same attack
sees through models trained without noise is what makes its failure worth something.
"""

from fractions import Fraction

import numpy as np
import pytest

from fedgrade.privacy.attack import AttackBound, bound_from_zcdp_epsilon
from tests.soak.lira import attack_scores, power, random_halves
from tests.soak.shadows import Items, Shadow, confidences, job_at

pytestmark = pytest.mark.slow

SHADOWS = 32
ITEMS = 1050  # half of them in each model: a site of 525
EPSILONS = (None, 8.0, 2.0)
DELTA = Fraction(1, 10**5)
NOTHING_BARRED = AttackBound(true_positive_rate=1.0, area_under_curve=1.0)
# Without noise, an area below this would say that the attack is weak, not that models are private.
VISIBLE = 0.62


def attack(spec, photos, epsilon):
    """Power of the attack on models trained at ``epsilon``; items and who is shown them are the same at every one."""
    rng = np.random.default_rng(0)  # the noise has no seed
    chosen = rng.permutation(len(photos.grades))[:ITEMS]
    items = Items(features=photos.features[chosen].astype(np.float32), grades=photos.grades[chosen])
    members = random_halves(SHADOWS, ITEMS, rng)
    shadows = [Shadow(spec=spec, epsilon=epsilon, items=items, members=shown) for shown in members]
    return power(attack_scores(confidences(shadows), members), members, rng)


def bound(spec, epsilon):
    """What any attack may reach on releases for training alone, whose claim this epsilon is."""
    if epsilon is None:
        return NOTHING_BARRED
    assert job_at(spec, epsilon, declared=ITEMS // 2).plan.delta == DELTA
    return bound_from_zcdp_epsilon(epsilon, delta=DELTA)


def test_no_evidence_against_the_claim_in_membership_attacks_on_real_photos(demo_spec, public_photos, publish):
    found = {epsilon: attack(demo_spec, public_photos, epsilon) for epsilon in EPSILONS}
    allowed = {epsilon: bound(demo_spec, epsilon) for epsilon in EPSILONS}
    publish("membership", figures(demo_spec, found, allowed))
    for epsilon in EPSILONS:
        assert found[epsilon].area_under_curve.low <= allowed[epsilon].area_under_curve, epsilon
        assert found[epsilon].true_positive_rate.low <= allowed[epsilon].true_positive_rate, epsilon
    # The attack works: it sees through models without noise, and noise is what takes its sight.
    assert found[None].area_under_curve.low > VISIBLE
    assert found[None].area_under_curve.low > found[8.0].area_under_curve.high
    assert found[8.0].area_under_curve.measured > found[2.0].area_under_curve.measured


def figures(spec, found, allowed):
    setup = (
        f"{SHADOWS} models a row, each trained on a random half of {ITEMS} photos by the site's and the coordinator's "
        f"own code ({spec.privacy.rounds} rounds, mode `local`, one site, nobody else's noise); each model is attacked "
        f"with the other {SHADOWS - 1} as shadows. In brackets: 95 % confidence. *Allowed* is the most that any attack "
        "can reach under the claim."
    )
    lines = [
        setup,
        "",
        "| privacy | AUC | allowed | true positives at 1 % false ones | allowed |",
        "|---|---|---|---|---|",
    ]
    for epsilon in EPSILONS:
        name = "none, and no clip" if epsilon is None else f"ε = {epsilon:g}"
        power_, most = found[epsilon], allowed[epsilon]
        lines.append(
            f"| {name} | {power_.area_under_curve} | {most.area_under_curve:.3f} | {power_.true_positive_rate} | "
            f"{most.true_positive_rate:.3f} |"
        )
    return [*lines, "", "No evidence against the claim."]
