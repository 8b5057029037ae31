from dataclasses import replace

import pytest

from fedgrade.errors import DocumentRefused, PolicyViolated
from fedgrade.federation.policy import admit
from fedgrade.job import plan_job
from fedgrade.trust.canonical import decode_yaml
from tests.federation.small_federation import DECLARED, NAMES, POLICY, SPEC, with_privacy

ITEMS = dict.fromkeys(NAMES, DECLARED)
TWO = dict.fromkeys(NAMES[:2], DECLARED)


def planned(spec=SPEC, items=ITEMS):
    return plan_job(spec, declared_items=items, nonce="0")


def admitted(job, policy=POLICY, *, site=NAMES[0], declared_items=DECLARED):
    admit(job, policy=policy, site=site, declared_items=declared_items)


def test_a_job_within_every_rule_is_admitted():
    admitted(planned())


@pytest.mark.parametrize(
    ("job", "policy", "line"),
    [
        (planned(items={**TWO, NAMES[2]: 9}), {}, "the job says this site declared 9 items; it declared 8"),
        (planned(items=TWO), {}, "site recycler-c is not among the participants"),
        (planned(), {"modes": ("distributed",)}, r"privacy.mode 'local' is not among policy.modes \['distributed'\]"),
        (planned(with_privacy(delta=1e-3)), {}, "privacy.delta 0.001 exceeds policy.delta 1e-05"),
        (planned(), {"maximum_rounds": 1}, "privacy.rounds 2 exceeds policy.maximum_rounds 1"),
        (planned(), {"minimum_participants": 4}, "3 participants; policy.minimum_participants is 4"),
        (planned(), {"backbones": ("resnet18",)}, "'tf_efficientnet_lite0' is not among policy.backbones"),
        (planned(), {"minimum_items": 9}, "8 declared items; policy.minimum_items is 9"),
        (planned(with_privacy(target_epsilon=41.0)), {}, "training would cost epsilon 4[01].*per_job is 40.00"),
        (planned(with_privacy(evaluation_epsilon=41.0)), {}, "evaluation would cost epsilon 4[01].*per_job is 40.00"),
        # Measured at the policy's delta, not at the job's: a stricter one makes the same plan dearer.
        (planned(), {"delta": 1e-5, "epsilon_per_job": 39.9}, "training would cost epsilon 40.00"),
        # An account that also takes Poisson runs splits its delta, so the same charges cost more.
        (planned(), {"modes": ("local", "local_sgd")}, "training would cost epsilon 40.[0-9]+; policy.epsilon_per_job"),
    ],
)
def test_each_rule_is_refused_with_its_own_line(job, policy, line):
    with pytest.raises(PolicyViolated, match=line):
        admitted(job, replace(POLICY, **policy), site=NAMES[2])


def test_a_line_is_one_line():
    with pytest.raises(PolicyViolated) as refused:
        admitted(planned(), replace(POLICY, minimum_participants=4))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilon_limit", "0.0"),
        ("epsilon_limit", ".inf"),
        ("epsilon_limit", ".nan"),
        ("epsilon_per_job", "-1.0"),
        ("delta", "1.0"),
        ("delta", "1.0e-10"),
        ("maximum_rounds", "0"),
        ("maximum_attempts", "-1"),
        ("minimum_participants", "0"),
        ("minimum_items", "0"),
        ("minimum_items", "1"),
        ("modes", "[remote]"),
        ("modes", "local"),
        ("epsilon_limit", "'8'"),
    ],
)
def test_an_impossible_policy_file_is_refused(field, value):
    plain = {
        "modes": "[local]", "epsilon_limit": "8.0", "delta": "1.0e-5", "epsilon_per_job": "4.0",
        "maximum_rounds": "500", "maximum_attempts": "3", "minimum_participants": "3", "minimum_items": "50",
        "backbones": "[tf_efficientnet_lite0]",
    }  # fmt: skip
    raw = "".join(f"{name}: {text}\n" for name, text in {**plain, field: value}.items())
    with pytest.raises(DocumentRefused):
        decode_yaml(type(POLICY), raw.encode())
