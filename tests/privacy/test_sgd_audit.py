"""An audit of ``local_sgd`` by the path that a site takes, of a head and of an adapter; at length in ``make soak``.

One file, because a file's tests share a process, and the plan that both audits use takes seconds to solve.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedgrade import training
from fedgrade.federation.payloads import Head, read_release
from fedgrade.federation.releases import SiteRows, compute_release
from fedgrade.job import plan_job
from tests.privacy.sgd_canaries import AXES, SITE, judged, sgd_claim, sgd_job, sgd_scores

pytestmark = pytest.mark.no_cover
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


# --- an adapter -------------------------------------------------------------------------------------------------------


def adapter_job(*, epsilon, rounds, local_steps):
    of_the_head = sgd_job(epsilon=epsilon, rate=0.5, rounds=rounds, local_steps=local_steps)
    model = replace(of_the_head.spec.model, trainable="adapter", adapter_rank=1)
    spec = replace(of_the_head.spec, model=model)
    return plan_job(spec, declared_items=of_the_head.declared_items, nonce="audit")


def test_canaries_find_no_evidence_against_an_adapters_training():
    job = adapter_job(epsilon=12.0, rounds=2, local_steps=8)
    findings = judged(sgd_scores(job, canaries=CANARIES), sgd_claim(job))
    assert not findings.failed, findings


@pytest.fixture(scope="module")
def one_step():
    return adapter_job(epsilon=0.5, rounds=1, local_steps=1)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, np.inf])
def test_one_item_moves_what_a_site_releases_by_at_most_the_clip(one_step, size, monkeypatch):
    """Whatever the item, whatever the weights that a coordinator chose, and with nothing left to chance."""
    recipes = []
    honest = training._settings

    def seen(module, recipe):
        recipes.append(recipe)
        return honest(module, recipe)

    monkeypatch.setattr(training, "_settings", seen)
    monkeypatch.setattr(training, "floating_gaussian", lambda count, *, scale: np.zeros(count) * scale)
    monkeypatch.setattr(training, "poisson_sample", lambda count, *, rate: np.ones(count, dtype=bool) & (rate > 0))
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(5, AXES)), rng.normal(size=(3, AXES)) * size])
    counts = [2, 1, 2, 3]
    whole = SiteRows(features=features, item_index=np.repeat(np.arange(4), counts), grades=np.array([0, 1, 0, 1]))
    rest = SiteRows(features=features[:5], item_index=np.repeat(np.arange(3), counts[:3]), grades=np.array([0, 1, 0]))
    parameters = one_step.spec.model.network_parameters
    head = Head(
        thresholds=rng.normal(size=one_step.head_shape()) * 100,
        centre=np.zeros(AXES),
        network=(rng.normal(size=parameters) * 100).astype(np.float32),
    )
    moved = released(one_step, head, whole) - released(one_step, head, rest)
    (recipe, _) = recipes
    batch = round(recipe.declared_items * recipe.mechanism.sampling_rate)
    clip = recipe.learning_rate * one_step.plan.max_grad_norm / batch
    # The change of the adapter travels in single precision.
    assert np.linalg.norm(moved) <= clip * (1 + 1e-4) + 1e-12


def released(job, head, rows):
    raw = compute_release(job, "train", head, site=SITE, rows=lambda _: rows)
    return np.asarray(read_release(raw, job, "train", site=SITE), dtype=np.float64)
