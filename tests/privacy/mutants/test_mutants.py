"""Every known way to get privacy wrong, applied to the real code, and the check that catches it: docs/mutants.md."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from torch import nn

from fedgrade import full_batch
from fedgrade.errors import ModelRefused
from fedgrade.federation import releases, site
from fedgrade.federation.charging import Charging
from fedgrade.federation.messages import Contribution
from fedgrade.federation.outbox import Outbox
from fedgrade.federation.sum_desk import SumDesk
from fedgrade.items import ItemBatch
from fedgrade.model.head import head_inputs
from fedgrade.model.networks import FrozenBatchNorm
from fedgrade.model.pooling import PooledBackbone
from fedgrade.privacy import grid
from fedgrade.privacy.budget import Spending
from fedgrade.privacy.noise import discrete_gaussian, floating_gaussian
from fedgrade.privacy.plan import TRAIN_GRID_BITS
from fedgrade.trust.records import DiscreteGaussian
from tests.federation.small_federation import NAMES, SmallFederation, ask, calibrate_once, quick_noise, told
from tests.privacy.mutants import checks

pytestmark = pytest.mark.no_cover
PARTNERS = 3
CHECKS = [
    checks.noise_is_as_large_as_charged,
    checks.presence_moves_the_sum_as_far_as_charged,
    checks.one_item_moves_the_sum_by_at_most_the_sensitivity,
    checks.a_long_gradient_is_shortened_to_the_clip_and_keeps_its_direction,
    checks.every_step_adds_the_noise_that_is_charged_whatever_the_batch,
    checks.one_item_moves_an_update_by_at_most_the_clip,
    checks.an_item_that_is_not_a_number_does_not_poison_an_update,
    checks.one_item_of_many_photos_moves_a_networks_update_by_at_most_the_clip,
    checks.training_norms_leaves_their_statistics_alone,
    checks.batches_are_as_random_as_the_amplification_claims,
    checks.photos_leave_no_trace_in_the_backbone,
    checks.charges_add_up_over_rounds_jobs_and_restarts,
    checks.a_request_asked_twice_gets_the_same_bytes,
    checks.photos_are_read_after_the_charge_is_on_disk,
    checks.a_share_of_noise_leaves_only_under_a_secure_sum,
    checks.why_a_release_failed_stays_at_the_site,
]
# These start sites with ledgers, where noise need not be exact: half a second each would go to it.
_WHOLE_PATH = frozenset(CHECKS[-5:])


@pytest.fixture(autouse=True)
def _solved_once(monkeypatch):
    monkeypatch.setattr("fedgrade.job.calibrate", calibrate_once)


@pytest.fixture
def quick_site(monkeypatch):
    monkeypatch.setattr(releases, "discrete_gaussian", quick_noise)


def run(check, tmp_path, monkeypatch):
    if check in _WHOLE_PATH:
        monkeypatch.setattr(releases, "discrete_gaussian", quick_noise)
    check(tmp_path / "federation")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_code_as_it_is_passes(check, tmp_path, monkeypatch):
    run(check, tmp_path, monkeypatch)


def noise_halved(patch):
    patch.setattr(releases, "discrete_gaussian", lambda size, *, scale: discrete_gaussian(size, scale=scale // 2))


def floating_noise_halved(patch):
    patch.setattr(
        "fedgrade.training.floating_gaussian", lambda size, *, scale: floating_gaussian(size, scale=scale / 2)
    )


def noise_divided_among_partners(patch):
    share = np.sqrt(PARTNERS)
    patch.setattr(
        releases, "discrete_gaussian", lambda size, *, scale: discrete_gaussian(size, scale=int(scale / share))
    )


def masks_left_off_where_no_commitments_came(patch):
    real = SumDesk.confirm

    def lenient(desk, job, ask, commitments, *, weights_digest):
        return None if commitments is None else real(desk, job, ask, commitments, weights_digest=weights_digest)

    patch.setattr(SumDesk, "confirm", lenient)


def seed_reused(patch):
    kept = {}

    def same(size, *, scale):
        if (size, scale) not in kept:
            kept[size, scale] = discrete_gaussian(size, scale=scale)
        return kept[size, scale]

    patch.setattr(releases, "discrete_gaussian", same)


def floating_seed_reused(patch):
    kept = {}

    def same(size, *, scale):
        if (size, scale) not in kept:
            kept[size, scale] = floating_gaussian(size, scale=scale)
        return kept[size, scale]

    patch.setattr("fedgrade.training.floating_gaussian", same)


def clip_not_applied(patch):
    patch.setattr(full_batch, "_clip_factors", lambda residuals, products, whole: whole)  # noqa: ARG005 - the signature


def neither_clip_nor_exact_check(patch):
    clip_not_applied(patch)
    patch.setattr(full_batch, "_on_grid", _unchecked)


def _unchecked(residuals, products):
    del products
    return np.nan_to_num(residuals, posinf=0, neginf=0).astype(np.int64)


def clip_not_applied_to_updates(patch):
    def every_item_whole(module):
        return torch.ones_like(module.get_norm_sample())

    def every_item_of_photos_whole(rows, max_grad_norm):
        del max_grad_norm
        return torch.ones(len(rows[0]), dtype=torch.float64)

    patch.setattr("fedgrade.training._clip_factors", every_item_of_photos_whole)
    patch.setattr(GradSampleModuleFastGradientClipping, "get_clipping_coef", every_item_whole)


def clip_by_parameter_and_not_by_item(patch):
    """Each threshold's part is shortened by its length over all items, which is then the clip."""

    def by_threshold(residuals, products, whole):
        lengths = np.sqrt(np.einsum("ipk,ipp->k", residuals.astype(float) ** 2, products.astype(float)))
        return np.minimum(whole, 2.0**TRAIN_GRID_BITS / lengths.max())

    patch.setattr(full_batch, "_clip_factors", by_threshold)


def clip_after_averaging_items(patch):
    """Everybody's photos become one item's, and that is clipped."""
    honest = releases.clipped_gradient_sum

    def averaged(thresholds, batch, *, max_grad_norm, mechanism):
        one = ItemBatch(
            inputs=batch.inputs.reshape(1, -1, batch.inputs.shape[2]),
            photo_weights=batch.photo_weights.reshape(1, -1) / len(batch),
            grades=batch.grades[:1],
        )
        return honest(thresholds, one, max_grad_norm=max_grad_norm, mechanism=mechanism)

    patch.setattr(releases, "clipped_gradient_sum", averaged)


def mean_instead_of_sum(patch):
    honest = releases.clipped_gradient_sum

    def mean(thresholds, batch, *, max_grad_norm, mechanism):
        return honest(thresholds, batch, max_grad_norm=max_grad_norm, mechanism=mechanism) // max(1, len(batch))

    patch.setattr(releases, "clipped_gradient_sum", mean)


def empty_batch_skipped(patch):
    honest = DPOptimizer.step

    def step(optimizer, closure=None):
        return None if optimizer.params[0].summed_grad is None else honest(optimizer, closure)

    patch.setattr(DPOptimizer, "step", step)


def batches_shuffled(patch):
    def shuffled(size, *, rate):
        return np.random.default_rng().permutation(size) < round(rate * size)

    patch.setattr("fedgrade.training.poisson_sample", shuffled)


def batch_norm_in_train_mode(patch):
    patch.setattr(PooledBackbone, "train", nn.Module.train)


def statistics_of_trained_norms_in_train_mode(patch):
    patch.setattr(FrozenBatchNorm, "train", nn.Module.train)


def photos_of_a_network_counted_as_items(patch):
    honest = releases._item_photos

    def each_photo_an_item(rows, model):
        alone = replace(rows, item_index=np.arange(len(rows.item_index)), grades=rows.grades[rows.item_index])
        return honest(alone, model)

    patch.setattr(releases, "_item_photos", each_photo_an_item)


def photos_counted_as_items(patch):
    def each_photo_an_item(rows, centre):
        inputs = head_inputs(rows.features, centre)[:, None, :]
        return ItemBatch(inputs=inputs, photo_weights=np.ones((len(inputs), 1)), grades=rows.grades[rows.item_index])

    patch.setattr(releases, "_padded", each_photo_an_item)


def not_a_number_let_through(patch):
    patch.setattr(torch, "isfinite", lambda tensor: torch.ones_like(tensor, dtype=torch.bool))


def fresh_accountant_each_round(patch):
    patch.setattr(Charging, "spending", lambda charging, account: Spending())  # noqa: ARG005 - the signature


def resend_with_fresh_noise(patch):
    patch.setattr(Outbox, "find", lambda outbox, request_digest: None)  # noqa: ARG005 - the signature
    patch.setattr(Charging, "require_fresh", lambda charging, ask, *, maximum_attempts: None)  # noqa: ARG005


def resend_forgotten(patch):
    patch.setattr(Outbox, "find", lambda outbox, request_digest: None)  # noqa: ARG005 - the signature


def reserve_after_compute(patch):
    reserve, commit, abort = Charging.reserve, Charging.commit, Charging.abort

    def postponed(charging, ask, **terms):
        del charging
        return SimpleNamespace(accounts=terms["accounts"], charge=lambda late: reserve(late, ask, **terms))

    def charged_then_committed(charging, ask, *, reserved, message_digest):
        return commit(charging, ask, reserved=reserved.charge(charging), message_digest=message_digest)

    def charged_then_aborted(charging, *, reserved, reason):
        abort(charging, reserved=reserved.charge(charging), reason=reason)

    patch.setattr(Charging, "reserve", postponed)
    patch.setattr(Charging, "commit", charged_then_committed)
    patch.setattr(Charging, "abort", charged_then_aborted)


def reasons_told_to_the_coordinator(patch):
    patch.setattr(site, "DataRefused", ModelRefused)


MUTANTS = [
    (noise_halved, checks.noise_is_as_large_as_charged),
    (floating_noise_halved, checks.every_step_adds_the_noise_that_is_charged_whatever_the_batch),
    (noise_divided_among_partners, checks.noise_is_as_large_as_charged),
    (masks_left_off_where_no_commitments_came, checks.a_share_of_noise_leaves_only_under_a_secure_sum),
    (clip_not_applied, checks.presence_moves_the_sum_as_far_as_charged),
    (neither_clip_nor_exact_check, checks.one_item_moves_the_sum_by_at_most_the_sensitivity),
    (neither_clip_nor_exact_check, checks.presence_moves_the_sum_as_far_as_charged),
    (clip_not_applied_to_updates, checks.one_item_moves_an_update_by_at_most_the_clip),
    (clip_by_parameter_and_not_by_item, checks.a_long_gradient_is_shortened_to_the_clip_and_keeps_its_direction),
    (clip_after_averaging_items, checks.presence_moves_the_sum_as_far_as_charged),
    (mean_instead_of_sum, checks.presence_moves_the_sum_as_far_as_charged),
    (seed_reused, checks.noise_is_as_large_as_charged),
    (floating_seed_reused, checks.every_step_adds_the_noise_that_is_charged_whatever_the_batch),
    (empty_batch_skipped, checks.every_step_adds_the_noise_that_is_charged_whatever_the_batch),
    (batch_norm_in_train_mode, checks.photos_leave_no_trace_in_the_backbone),
    (statistics_of_trained_norms_in_train_mode, checks.training_norms_leaves_their_statistics_alone),
    (
        clip_not_applied_to_updates,
        checks.one_item_of_many_photos_moves_a_networks_update_by_at_most_the_clip,
    ),
    (
        photos_of_a_network_counted_as_items,
        checks.one_item_of_many_photos_moves_a_networks_update_by_at_most_the_clip,
    ),
    (fresh_accountant_each_round, checks.charges_add_up_over_rounds_jobs_and_restarts),
    (resend_with_fresh_noise, checks.a_request_asked_twice_gets_the_same_bytes),
    (resend_forgotten, checks.a_request_asked_twice_gets_the_same_bytes),
    (photos_counted_as_items, checks.one_item_moves_the_sum_by_at_most_the_sensitivity),
    (not_a_number_let_through, checks.an_item_that_is_not_a_number_does_not_poison_an_update),
    (batches_shuffled, checks.batches_are_as_random_as_the_amplification_claims),
    (reasons_told_to_the_coordinator, checks.why_a_release_failed_stays_at_the_site),
    (reserve_after_compute, checks.photos_are_read_after_the_charge_is_on_disk),
]


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda function: function.__name__)
def test_the_mutant_is_caught(mutant, check, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        if check in _WHOLE_PATH:
            patch.setattr(releases, "discrete_gaussian", quick_noise)
        mutant(patch)
        with pytest.raises(AssertionError):
            check(tmp_path / "federation")


@pytest.mark.usefixtures("quick_site")
def test_a_site_that_charges_late_works_and_is_caught_because_photos_were_read_before_the_charge(tmp_path, monkeypatch):
    """A mutant that crashed would fail the check as well, and prove nothing."""
    reserve_after_compute(monkeypatch)
    federation = SmallFederation.create(tmp_path / "working")
    job = federation.job()
    with federation.site() as late:
        late.answer(federation.admission(job))
        assert isinstance(told(federation, late, federation.question(job, ask("train"))), Contribution)
    (charge,) = federation.charges(NAMES[0])
    assert charge.purpose == "train"
    with pytest.raises(AssertionError, match=r"read when the ledger had \[0\] charges"):
        checks.photos_are_read_after_the_charge_is_on_disk(tmp_path / "federation")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_without_a_clip_the_exact_check_still_drops_whatever_is_too_long_or_no_number(monkeypatch):
    """NaN cannot get through on the integer grid: two lines would have to go, and only one is a clip."""
    monkeypatch.setattr(grid, "clip_rows", lambda rows, max_norm: rows)  # noqa: ARG005 - the signature
    rows = np.array([[np.nan, 0.0], [np.inf, 0.0], [3.0, 4.0], [0.5, 0.0]])
    integers = grid.grid_rows(rows, max_norm=1.0, mechanism=DiscreteGaussian(sensitivity=1000, scale=1))
    assert integers.tolist() == [[0, 0], [0, 0], [0, 0], [499, 0]]
    clip_not_applied(monkeypatch)
    gradients = np.array([[np.nan, 0.0], [np.inf, 0.0], [6.0, 8.0], [1.0, 0.0]])
    batch = ItemBatch(inputs=gradients[:, None], photo_weights=np.ones((4, 1)), grades=np.zeros(4, dtype=np.int64))
    total = full_batch.clipped_gradient_sum(np.zeros((1, 2)), batch, max_grad_norm=1.0, mechanism=checks.MECHANISM)
    assert total.tolist() == [2**39, 0]


def test_no_seed_can_be_given_to_what_draws_noise():
    """There is nothing to configure: what draws noise takes a size and a scale."""
    for draw in (discrete_gaussian, floating_gaussian):
        assert set(inspect.signature(draw).parameters) == {"size", "scale"}
