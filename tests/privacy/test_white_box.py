"""What an observer who sees everything finds in a site's releases: no evidence against what the ledger was charged.

Canaries enter as a site's own photos do: features of one axis each, one to three photos an item. They pass through
``compute_release`` (head inputs, padding, gradients, clip, grid, sum, noise, wire) once a round; a white-box
observer then looks along each canary's axis. If the release is what the ledger was charged for, scores are N(shift, 1)
for items that took part and N(0, 1) for those that did not. Statistics are written out here on purpose: a second
method, that shares no code with ``fedgrade audit`` and puts nothing in the place of the site's own rows.
"""

from dataclasses import dataclass
from math import exp, sqrt

import numpy as np
import pytest
from scipy.stats import binom

from fedgrade import full_batch
from fedgrade.aggregation.mean import AggregationSpec
from fedgrade.federation import releases
from fedgrade.federation.payloads import Head
from fedgrade.federation.releases import SiteRows, compute_release
from fedgrade.grading import GradeScale
from fedgrade.items import ItemBatch
from fedgrade.job import DataSpec, JobSpec, plan_job
from fedgrade.model.head import BIAS_FEATURE
from fedgrade.model.spec import ModelSpec
from fedgrade.model.weights import read_weights
from fedgrade.privacy.plan import LocalSpec
from fedgrade.trust.identity import SiteId

SITE = SiteId("site-a")
AXES = 1280
CANARIES = 800
EPSILON, ROUNDS = 4.0, 3
# Gradients of an undecided head are half an input long; a clip below that leaves each canary with exactly the clip.
CLIP = 0.25
FIVE_DEVIATIONS = 5.0  # by chance once in 1.7 million runs

JOB = plan_job(
    JobSpec(
        name="audit",
        data=DataSpec(asset_type="panel", test_fraction=0.2, synthetic_ceiling=0.0, minimum_items=2),
        model=ModelSpec(
            backbone="tf_efficientnet_lite0", input_size=224, pooling=("average",), weights_digest="a" * 64
        ),
        grading=GradeScale(name="two", labels=("A", "B"), critical=(), cost=((0.0, 1.0), (1.0, 0.0))),
        privacy=LocalSpec(
            target_epsilon=EPSILON,
            delta=1e-5,
            evaluation_epsilon=1.0,
            centre_share=0.01,
            rounds=ROUNDS,
            max_grad_norm=CLIP,
        ),
        aggregation=AggregationSpec(learning_rate=1.0, momentum=0.0, average_last=1.0, minimum_sites=2),
    ),
    declared_items={SITE: 500, SiteId("site-b"): 500},
    nonce="audit",
)
MECHANISM = JOB.plan.train
# An input is its axis and the constant bias feature; the axis has this part of the clipped gradient's length.
ALONG_AXIS = 1 / sqrt(1 + BIAS_FEATURE**2)
SHIFT = sqrt(ROUNDS) * MECHANISM.sensitivity / MECHANISM.scale * ALONG_AXIS


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Standard errors by which mean shift and deviation of noise miss the claim, and a lower bound on epsilon."""

    shift: float
    deviation: float
    lower_bound: float

    @property
    def against_the_claim(self):
        found = abs(self.shift) > FIVE_DEVIATIONS or abs(self.deviation) > FIVE_DEVIATIONS
        return found or self.lower_bound > EPSILON


def canary_rows(included):
    """A site whose items are the ``included`` axes, item k with 1 + k % 3 photos alike."""
    axes = np.flatnonzero(included)
    item_index = np.repeat(np.arange(len(axes)), 1 + np.arange(len(axes)) % 3)
    features = np.zeros((len(item_index), AXES))
    features[np.arange(len(item_index)), axes[item_index]] = 7.0
    return SiteRows(features=features, item_index=item_index, grades=np.zeros(len(axes), dtype=np.int64))


def released(rows):
    head = Head(thresholds=np.zeros(JOB.head_shape()), centre=np.zeros(AXES))
    raw = compute_release(JOB, "train", head, site=SITE, rows=lambda _: rows)
    return read_weights(raw, expected={"release": ((AXES + 1,), "int64")})["release"]


def refuted(guesses, right, delta, epsilon):
    """Whether so many right guesses refute ``epsilon`` at 5 %: Steinke et al. (2023), Theorem 5.2."""
    chance = 1 / (1 + exp(-epsilon))
    tail, slope, mass = binom.sf(right - 1, guesses, chance), 0.0, 0.0
    for fewer in range(1, right + 1):
        mass += binom.pmf(right - fewer, guesses, chance)
        slope = max(slope, mass / fewer)
    return tail + 2 * CANARIES * delta * slope <= 0.05


def lower_bound(scores, included, guesses=100):
    right = int(included[np.argsort(-scores)[:guesses]].sum())
    return max([0.0, *(epsilon for epsilon in np.arange(0.5, 12, 0.5) if refuted(guesses, right, 1e-5, epsilon))])


def canary_audit():
    included = np.zeros(CANARIES, dtype=bool)
    included[np.random.default_rng().permutation(CANARIES)[: CANARIES // 2]] = True
    total = sum(released(canary_rows(included)).astype(np.float64) for _ in range(ROUNDS))
    along = total[:AXES] / (MECHANISM.scale * sqrt(ROUNDS))
    scores, quiet = along[:CANARIES], np.concatenate([along[:CANARIES][~included], along[CANARIES:]])
    shift = scores[included].mean() - scores[~included].mean()
    return Findings(
        shift=(shift - SHIFT) / sqrt(4 / CANARIES),
        deviation=(sqrt(np.mean(quiet**2)) - 1) * sqrt(2 * len(quiet)),
        lower_bound=lower_bound(scores, included),
    )


def test_canaries_find_no_evidence_against_the_real_release():
    findings = canary_audit()
    assert not findings.against_the_claim, findings


def test_the_lower_bound_is_not_idle():
    # Scores that tell everything refute any small epsilon; scores that tell nothing refute none.
    included = np.arange(CANARIES) % 2 == 0
    assert lower_bound(included.astype(float), included) >= 3
    assert lower_bound(np.zeros(CANARIES), included) == 0.0


def test_noise_is_drawn_before_any_item_is_read(monkeypatch):
    order, draw = [], releases.discrete_gaussian

    def drawn(size, *, scale):
        order.append("noise")
        return draw(size, scale=scale)

    def read(_):
        order.append("items")
        return canary_rows(np.arange(CANARIES) < 3)

    monkeypatch.setattr(releases, "discrete_gaussian", drawn)
    head = Head(thresholds=np.zeros(JOB.head_shape()), centre=np.zeros(AXES))
    for purpose in ("centre", "train", "evaluate"):
        compute_release(JOB, purpose, head, site=SITE, rows=read)
    assert order == ["noise", "items"] * 3


# --- mutants; more of them in mutants/ ----------------------------------------------------------------------------


def noise_halved(patch):
    draw = releases.discrete_gaussian
    patch.setattr(releases, "discrete_gaussian", lambda size, *, scale: draw(size, scale=scale // 2))


def noise_on_the_first_coordinates_only(patch):
    draw = releases.discrete_gaussian

    def partly(size, *, scale):
        return np.concatenate([draw(size // 2, scale=scale), np.zeros(size - size // 2, dtype=np.int64)])

    patch.setattr(releases, "discrete_gaussian", partly)


def clip_not_applied(patch):
    def unchecked(residuals, products):
        del products
        return residuals.astype(np.int64)

    patch.setattr(full_batch, "_clip_factors", lambda residuals, products, whole: whole)  # noqa: ARG005 - the signature
    patch.setattr(full_batch, "_on_grid", unchecked)


def clip_of_columns(patch):
    def by_threshold(residuals, products, whole):
        lengths = np.sqrt(np.einsum("ipk,ipp->k", residuals.astype(float) ** 2, products.astype(float)))
        return np.minimum(whole, MECHANISM.sensitivity / lengths.max())

    patch.setattr(full_batch, "_clip_factors", by_threshold)


def mean_instead_of_sum(patch):
    total = full_batch.clipped_gradient_sum

    def mean(thresholds, batch, **named):
        return total(thresholds, batch, **named) // max(1, len(batch))

    patch.setattr(releases, "clipped_gradient_sum", mean)


def every_photo_an_item(patch):
    whole = releases._padded

    def split(rows, centre):
        batch = whole(rows, centre)
        item, photo = np.nonzero(batch.photo_weights)
        return ItemBatch(
            inputs=batch.inputs[item, photo][:, None, :],
            photo_weights=np.ones((len(item), 1)),
            grades=batch.grades[item],
        )

    patch.setattr(releases, "_padded", split)


def a_grid_twice_as_fine_as_charged(patch):
    snap = full_batch._on_grid
    patch.setattr(full_batch, "_on_grid", lambda residuals, products: 2 * snap(residuals, products))


MUTANTS = (
    noise_halved,
    noise_on_the_first_coordinates_only,
    clip_not_applied,
    clip_of_columns,
    mean_instead_of_sum,
    every_photo_an_item,
    a_grid_twice_as_fine_as_charged,
)


@pytest.mark.parametrize("mutate", MUTANTS)
def test_canaries_catch_the_mutant(monkeypatch, mutate):
    mutate(monkeypatch)
    findings = canary_audit()
    assert findings.against_the_claim, findings
