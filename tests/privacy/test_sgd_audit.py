"""An audit of ``local_sgd`` through the path that a site takes; at length in ``make soak``."""

import pytest

from fedgrade import training
from tests.privacy.sgd_canaries import judged, sgd_claim, sgd_job, sgd_scores

CANARIES = 800


@pytest.fixture(scope="module")
def job():
    return sgd_job(epsilon=12.0, rate=0.5, rounds=2, local_steps=8)


def test_canaries_find_no_evidence_against_local_sgd(job):
    findings = judged(sgd_scores(job, canaries=CANARIES), sgd_claim(job))
    assert not findings.failed, findings
    assert findings.lower_bound.highest <= 12.0


def noise_halved(patch):
    draw = training.floating_gaussian
    patch.setattr(training, "floating_gaussian", lambda size, *, scale: draw(size, scale=scale / 2))


def the_same_noise_in_every_step(patch):
    drawn, draw = {}, training.floating_gaussian

    def once(size, *, scale):
        return drawn.setdefault(size, draw(size, scale=scale))

    patch.setattr(training, "floating_gaussian", once)


def every_item_in_every_batch(patch):
    sample = training.poisson_sample
    patch.setattr(training, "poisson_sample", lambda size, *, rate: sample(size, rate=1.0 if rate < 1 else rate))


def clip_doubled(patch):
    add_noise = training._add_noise

    def doubled(optimizer):
        for parameter in optimizer.params:
            parameter.summed_grad = 2 * parameter.summed_grad
        add_noise(optimizer)

    patch.setattr(training, "_add_noise", doubled)


@pytest.mark.parametrize(
    ("mutate", "named"),
    [
        (noise_halved, "standard deviation"),
        (the_same_noise_in_every_step, "standard deviation"),
        (every_item_in_every_batch, "mean shift"),
        (clip_doubled, "mean shift"),
    ],
)
def test_canaries_catch_the_mutant(job, monkeypatch, mutate, named):
    mutate(monkeypatch)
    findings = judged(sgd_scores(job, canaries=CANARIES), sgd_claim(job))
    assert named in findings.failed, findings
