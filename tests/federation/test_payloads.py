from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrade.aggregation.mean import sum_of_releases
from fedgrade.errors import ModelRefused
from fedgrade.federation.payloads import (
    MAX_WEIGHT,
    Head,
    largest_release,
    read_head,
    read_release,
    release_size,
    write_head,
)
from fedgrade.job import plan_job
from fedgrade.model.weights import write_weights
from tests.federation.small_federation import DECLARED, LOCAL_SGD, NAMES, SPEC

JOB = plan_job(SPEC, declared_items=dict.fromkeys(NAMES, DECLARED), nonce="0")
SHAPE = JOB.head_shape()
SITE = NAMES[0]
LEAST, MOST = -(2**63), 2**63 - 1


def release_of(number, purpose="evaluate"):
    array = np.zeros(release_size(JOB, purpose), dtype=np.int64)
    array[-1] = number
    return write_weights({"release": array}, metadata={})


def head_of(**changes):
    arrays = {"thresholds": np.zeros(SHAPE), "centre": np.zeros(SHAPE[1] - 1), **changes}
    return write_weights(arrays, metadata={})


def test_a_head_survives_the_way():
    head = Head(thresholds=np.full(SHAPE, 0.25), centre=np.linspace(0, 1, SHAPE[1] - 1))
    read = read_head(write_head(head), JOB)
    assert np.array_equal(read.thresholds, head.thresholds)
    assert np.array_equal(read.centre, head.centre)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 64,
        head_of(thresholds=np.full(SHAPE, 1e30)),
        head_of(centre=np.full(SHAPE[1] - 1, -2 * MAX_WEIGHT)),
        head_of(thresholds=np.zeros((SHAPE[0], SHAPE[1] + 1))),
        head_of(thresholds=np.zeros(SHAPE[::-1])),
        head_of(thresholds=np.zeros(SHAPE, dtype=np.float32)),
        head_of(thresholds=np.zeros(SHAPE, dtype=np.int64)),
        head_of(more=np.zeros(1)),
        write_weights({"thresholds": np.zeros(SHAPE)}, metadata={}),
        head_of() + b"\0",
        head_of()[:-1],
    ],
)
def test_a_head_of_other_shape_type_or_size_is_refused(raw):
    with pytest.raises(ModelRefused):
        read_head(raw, JOB)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_head_with_a_number_that_is_none_is_refused(number):
    raw = head_of(thresholds=np.full(SHAPE, 0.5)).replace(np.float64(0.5).tobytes(), np.float64(number).tobytes(), 1)
    with pytest.raises(ModelRefused, match="not finite"):
        read_head(raw, JOB)


@pytest.mark.parametrize("purpose", ["centre", "train", "evaluate"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_release_is_taken_up_to_the_limit_and_not_beyond(purpose, sign):
    limit = largest_release(JOB, purpose, site=SITE)
    assert read_release(release_of(sign * limit, purpose), JOB, purpose, site=SITE)[-1] == sign * limit
    with pytest.raises(ModelRefused, match=r"release of recycler-a: a number exceeds .*; no honest site sends that"):
        read_release(release_of(sign * (limit + 1), purpose), JOB, purpose, site=SITE)


@pytest.mark.parametrize("number", [LEAST, LEAST + 1, MOST])
def test_the_ends_of_sixty_four_bits_are_refused(number):
    with pytest.raises(ModelRefused, match="no honest site"):
        read_release(release_of(number), JOB, "evaluate", site=SITE)


def test_the_limit_leaves_room_for_every_item_at_full_length_and_much_noise():
    mechanism = JOB.plan.evaluate
    assert largest_release(JOB, "evaluate", site=SITE) >= 2 * DECLARED * mechanism.sensitivity + 20 * mechanism.scale


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["limit", "-limit"]), min_size=3, max_size=3), st.floats(0.02, 400))
def test_sums_of_what_is_taken_never_overflow(signs, epsilon):
    spec = replace(SPEC, privacy=replace(SPEC.privacy, target_epsilon=epsilon))
    job = plan_job(spec, declared_items=dict.fromkeys(NAMES, DECLARED), nonce="0")
    limits = [largest_release(job, "centre", site=site) * (-1 if sign[0] == "-" else 1) for site, sign in
              zip(NAMES, signs, strict=True)]  # fmt: skip
    total = sum_of_releases([np.array([limit], dtype=np.int64) for limit in limits])
    assert int(total[0]) == sum(limits)


def test_updates_of_local_steps_are_bounded_too():
    job = plan_job(LOCAL_SGD, declared_items=dict.fromkeys(NAMES, DECLARED), nonce="0")
    size = release_size(job, "train")
    assert read_release(write_weights({"update": np.full(size, 1.5)}, metadata={}), job, "train", site=SITE)[0] == 1.5
    half = write_weights({"update": np.full(size, 0.5)}, metadata={})
    for number in (1e30, -1e30, np.nan, np.inf):
        raw = half.replace(np.float64(0.5).tobytes(), np.float64(number).tobytes(), 1)
        with pytest.raises(ModelRefused):
            read_release(raw, job, "train", site=SITE)
    with pytest.raises(ModelRefused):
        read_release(release_of(0, "train"), job, "train", site=SITE)
