import json
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from functools import reduce

import pytest

from fedgrade.aggregation.mean import AggregationSpec
from fedgrade.errors import FedgradeError, JobRefused, PlanRefused
from fedgrade.federation.payloads import largest_release
from fedgrade.grading import GradeScale
from fedgrade.job import DataSpec, JobSpec, TrainingJob, plan_job
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, ModelSpec
from fedgrade.privacy.plan import DistributedSpec, LocalSpec, calibrate, observer_epsilons
from fedgrade.trust.canonical import decode, digest, encode
from fedgrade.trust.identity import site_id

SCALE = GradeScale(
    name="three", labels=("A", "B", "C"), critical=("C",), cost=((0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (4.0, 2.0, 0.0))
)
PRIVACY = LocalSpec(
    target_epsilon=8.0, delta=1e-5, evaluation_epsilon=4.0, centre_share=0.2, rounds=3, max_grad_norm=1.0
)
DISTRIBUTED = DistributedSpec(
    target_epsilon=2.0,
    floor_epsilon=8.0,
    delta=1e-5,
    evaluation_epsilon=4.0,
    centre_share=0.2,
    rounds=3,
    max_grad_norm=1.0,
)
SPEC = JobSpec(
    name="small",
    data=DataSpec(asset_type="laptop", test_fraction=0.25, synthetic_ceiling=0.1, minimum_items=50),
    model=ModelSpec(
        backbone="tf_efficientnet_lite0",
        input_size=224,
        pooling=("average", "maximum"),
        weights_digest=LITE0_WEIGHTS_DIGEST,
    ),
    grading=SCALE,
    privacy=PRIVACY,
    aggregation=AggregationSpec(learning_rate=2.0, momentum=0.5, average_last=0.5, minimum_sites=2),
)
A, B, C = (site_id(f"recycler-{letter}") for letter in "abc")
DECLARED = {B: 300, A: 200}
JOB = plan_job(SPEC, declared_items=DECLARED, nonce="first")
SHARED = replace(SPEC, privacy=DISTRIBUTED, aggregation=replace(SPEC.aggregation, method="secure_sum"))


def planned(spec=SPEC, *, declared_items=DECLARED, nonce="first"):
    return plan_job(spec, declared_items=declared_items, nonce=nonce)


def changed(value, path, new):
    """``value`` with the field at a dotted ``path`` replaced."""
    field, _, rest = path.partition(".")
    return replace(value, **{field: changed(getattr(value, field), rest, new) if rest else new})


def leaves(value, prefix=""):
    """Dotted names of every field below a dataclass."""
    for field in fields(value):
        inner = getattr(value, field.name)
        if is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


# What else each field could be. A field without an entry here fails the test that counts them.
OTHERWISE = {
    "name": "large",
    "data.asset_type": "phone",
    "data.test_fraction": 0.3,
    "data.synthetic_ceiling": 0.0,
    "data.minimum_items": 51,
    "model.input_size": 256,
    "model.pooling": ("maximum", "average"),
    "model.weights_digest": "0" * 64,
    "model.adapter_rank": 8,
    "model.views": ("upright", "rotate_180"),
    "grading.name": "four",
    "grading.labels": ("A", "B", "D"),
    "grading.critical": ("B", "C"),
    "grading.cost": ((0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (4.5, 2.0, 0.0)),
    "privacy.target_epsilon": 7.0,
    "privacy.delta": 2e-5,
    "privacy.evaluation_epsilon": 5.0,
    "privacy.centre_share": 0.25,
    "privacy.rounds": 4,
    "privacy.max_grad_norm": 1.5,
    "aggregation.method": "secure_sum",
    "aggregation.learning_rate": 2.5,
    "aggregation.momentum": 0.0,
    "aggregation.average_last": 0.6,
    "aggregation.minimum_sites": 1,
}
# Each goes with others: a backbone with its weights, what is trained with the mode.
ONE_VALUE = {"model.backbone", "model.trainable", "privacy.mode", "aggregation.tolerate_dropouts"}


def test_every_field_of_a_spec_is_known_to_these_tests():
    assert set(leaves(SPEC)) == set(OTHERWISE) | ONE_VALUE


@pytest.mark.parametrize("path", OTHERWISE)
def test_a_change_in_any_field_is_another_job(path):
    spec = changed(SPEC, "grading.critical", ()) if path == "grading.labels" else SPEC
    assert planned(changed(spec, path, OTHERWISE[path])).digest != planned(spec).digest


def test_who_takes_part_with_how_much_and_when_is_part_of_the_job():
    others = [
        planned(declared_items={A: 201, B: 300}),
        planned(declared_items={A: 300, B: 200}),
        planned(declared_items={A: 200, C: 300}),
        planned(declared_items={A: 200, B: 300, C: 50}),
        planned(nonce="second"),
        planned(SHARED),
        planned(replace(SHARED, privacy=replace(DISTRIBUTED, floor_epsilon=9.0))),
    ]
    assert len({job.digest for job in [JOB, *others]}) == len(others) + 1


def test_a_job_is_named_by_its_bytes_not_by_the_order_they_were_put_in():
    assert JOB.digest == digest(encode(JOB))
    assert planned(declared_items={A: 200, B: 300}).digest == JOB.digest
    assert JOB.participants == (A, B)


@pytest.mark.parametrize("spec", [SPEC, SHARED])
def test_decoding_gives_back_the_job_and_its_digest(spec):
    job = planned(spec)
    again = decode(TrainingJob, encode(job))
    assert again == job
    assert again.digest == job.digest


def test_a_spec_alone_survives_its_encoding():
    assert decode(JobSpec, encode(SPEC)) == SPEC


def test_the_plan_is_the_one_that_follows_from_the_spec():
    assert JOB.plan == calibrate(PRIVACY, participants=2)
    assert JOB.plan.delta == Fraction(1, 100_000)


def test_the_head_has_a_row_a_threshold_and_a_column_a_feature_and_the_bias():
    assert JOB.head_shape() == (2, 2 * 1280 + 1)


OTHER_PLAN = {
    "target_epsilon": Fraction(9),
    "delta": Fraction(1, 100_001),
    "rounds": 2,
    "max_grad_norm": 2.0,
    "mode": "distributed",
    "centre.scale": JOB.plan.centre.scale - 1,
    "train.scale": JOB.plan.train.scale - 1,
    "evaluate.scale": JOB.plan.evaluate.scale + 1,
}


@pytest.mark.parametrize("path", OTHER_PLAN)
def test_a_plan_that_is_not_the_specs_own_is_refused(path):
    plan = changed(JOB.plan, path, OTHER_PLAN[path])
    with pytest.raises(JobRefused, match=r"^plan: is not the one that follows from the job's own privacy spec"):
        replace(JOB, plan=plan)


def test_the_plan_of_another_number_of_sites_is_refused():
    plan = calibrate(DISTRIBUTED, participants=3)
    assert plan != calibrate(DISTRIBUTED, participants=2)
    with pytest.raises(JobRefused, match=r"^plan: is not the one"):
        TrainingJob(spec=SHARED, declared_items=DECLARED, plan=plan, nonce="")


@pytest.mark.parametrize("minimum_sites", [2, 3, 4])
def test_shares_of_noise_keep_the_target_whoever_answers(minimum_sites):
    spec = replace(SHARED, aggregation=replace(SHARED.aggregation, minimum_sites=minimum_sites))
    sites = {site_id(f"recycler-{letter}"): 300 for letter in "abcd"}
    plan = plan_job(spec, declared_items=sites, nonce="").plan
    for answering in range(minimum_sites, len(sites) + 1):
        seen = observer_epsilons(plan, participants=answering)
        assert seen.coordinator <= seen.other_partner <= DISTRIBUTED.target_epsilon


# These have one value each: what they are, and the grid they are on.
FIXED = [f"{mechanism}.{field}" for mechanism in ("centre", "train", "evaluate") for field in ("kind", "sensitivity")]


def test_every_field_of_a_plan_is_known_to_these_tests():
    assert set(leaves(JOB.plan)) == {*OTHER_PLAN, *FIXED}


@pytest.mark.parametrize("path", [*OTHER_PLAN, *FIXED])
def test_no_bytes_carry_a_job_whose_plan_was_altered(path):
    tree = json.loads(encode(JOB))
    *way, last = path.split(".")
    node = reduce(dict.__getitem__, way, tree["plan"])
    other = OTHER_PLAN.get(path, "poisson_gaussian" if last == "kind" else 2**19)
    node[last] = f"{other.numerator}/{other.denominator}" if isinstance(other, Fraction) else other
    with pytest.raises(FedgradeError) as refusal:
        decode(TrainingJob, json.dumps(tree).encode())
    assert "\n" not in str(refusal.value)


def test_a_plan_on_another_grid_cannot_even_be_made():
    with pytest.raises(PlanRefused, match=r"^plan: train sensitivity 524288 is not the grid's 2\^40$"):
        changed(JOB.plan, "train.sensitivity", 2**19)


@pytest.mark.parametrize(
    ("declared_items", "complaint"),
    [
        ({A: 200, B: 49}, r"participant recycler-b: 49 items; data\.minimum_items asks for more"),
        ({A: 200, B: 0}, r"participant recycler-b: 0 items; data\.minimum_items asks for more"),
        ({A: 200, B: -300}, r"participant recycler-b: -300 items; data\.minimum_items asks for more"),
        ({A: 200, "Not A Name": 300}, "site "),
        ({A: 200, "../b": 300}, "site "),
        ({A: 200}, "privacy: 1 participants; federated training takes 2 or more"),
        ({}, "privacy: 0 participants; federated training takes 2 or more"),
        ({f"site-{number}": 200 for number in range(1001)}, "participants: 1001; the limit is 1000"),
    ],
)
def test_participants_that_cannot_take_part_are_refused_in_one_line(declared_items, complaint):
    with pytest.raises(FedgradeError, match=f"^{complaint}") as refusal:
        planned(declared_items=declared_items)
    assert "\n" not in str(refusal.value)


def test_a_quorum_larger_than_the_roll_is_refused():
    with pytest.raises(JobRefused, match=r"^aggregation\.minimum_sites: 3 exceeds the 2 participants$"):
        planned(changed(SPEC, "aggregation.minimum_sites", 3))


def test_a_federation_whose_sum_may_not_fit_64_bits_is_refused():
    """An honest release is taken whatever is in it: nothing that the coordinator would have to refuse is planned."""
    most = {f"site-{number}": 9_000 for number in range(400)}
    job = planned(declared_items=most)
    train = job.plan.train
    for site in list(most)[:3]:
        honest = 9_000 * train.sensitivity + 10 * train.scale
        assert honest <= largest_release(job, "train", site=site)
        assert largest_release(job, "train", site=site) * len(most) < 2**63
    with pytest.raises(
        JobRefused, match=r"^participants: 500 sites of up to 9000 items, with noise of \d+ on a grid of"
    ):
        planned(declared_items={f"site-{number}": 9_000 for number in range(500)})
    other = planned(changed(SPEC, "privacy.target_epsilon", 0.02), declared_items=dict(list(most.items())[:10]))
    assert other.plan.train.scale > 2**44
    with pytest.raises(JobRefused, match=r"may not fit 64 bits; name fewer sites, or allow a larger epsilon$"):
        planned(changed(SPEC, "privacy.target_epsilon", 0.02), declared_items=most)


def test_delta_is_at_most_a_tenth_of_one_over_the_items():
    # At delta 1e-5 exactly 10,000 items are protected; one more, and it is too large.
    assert planned(declared_items={A: 200, B: 10_000}).declared_items[B] == 10_000
    refusal = r"^privacy\.delta: 1e-05 is too large for the 10001 items of recycler-b; at most 1/\(10 n\) = 1\.0e-05$"
    with pytest.raises(JobRefused, match=refusal):
        planned(declared_items={A: 200, B: 10_001})
    with pytest.raises(JobRefused, match=r"^privacy\.delta: 0\.001 is too large for the 300 items of recycler-b"):
        planned(changed(SPEC, "privacy.delta", 1e-3), declared_items={B: 300, A: 60})


@pytest.mark.parametrize("name", ["", "-small", "Small", "sm all", "small\n", "a" * 64, "../small", "klein\u00e9"])
def test_a_name_that_could_not_be_a_folder_is_refused(name):
    with pytest.raises(JobRefused, match=r"^name: .* must be 1 to 63 of a-z, 0-9, '\.', '_' and '-'$") as refusal:
        replace(SPEC, name=name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "wrong", "rule"),
    [
        ("test_fraction", (0.0, 1.0, -0.1, float("nan")), "must be above 0 and below 1"),
        ("synthetic_ceiling", (-0.1, 1.1, float("nan")), r"must be in \[0, 1\]"),
        ("minimum_items", (1, 0, -5), "must be at least 2; a single item has none to hide among"),
    ],
)
def test_an_impossible_wish_about_data_is_refused(field, wrong, rule):
    for value in wrong:
        with pytest.raises(JobRefused, match=rf"^data\.{field}: {value} {rule}$"):
            changed(SPEC, f"data.{field}", value)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("privacy.target_epsilon", 0.0),
        ("privacy.evaluation_epsilon", float("inf")),
        ("privacy.delta", 1.0),
        ("privacy.centre_share", 1.0),
        ("privacy.rounds", 0),
        ("privacy.max_grad_norm", -1.0),
        ("model.input_size", 63),
        ("model.pooling", ()),
        ("model.weights_digest", "A" * 64),
        ("model.backbone", "resnet50"),
    ],
)
def test_an_impossible_part_of_a_spec_is_refused_by_its_name(path, wrong):
    with pytest.raises(JobRefused, match=f"^{path}: ") as refusal:
        changed(SPEC, path, wrong)
    assert "\n" not in str(refusal.value)


def test_a_field_that_no_job_has_is_refused():
    tree = json.loads(encode(JOB))
    tree["spec"]["privacy"]["seed"] = 0
    with pytest.raises(FedgradeError, match="unknown key"):
        decode(TrainingJob, json.dumps(tree).encode())
