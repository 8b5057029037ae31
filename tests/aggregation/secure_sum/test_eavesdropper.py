"""What a captured attempt says about any site's update, and what it would say without masks."""

from dataclasses import replace

import numpy as np
import pytest

from fedgrade.aggregation.secure_sum.masks import Mask, Party, apply_masks, pair_mask
from tests.aggregation.secure_sum.partnership import TASK, Partnership, names

SIZE = 20_000
GRID = 2**20
# Six standard deviations: an honest run fails once in many millions.
SIGMAS = 6.0


@pytest.fixture(scope="module")
def chance():
    return np.random.default_rng(20260101)


def integers(chance):
    return np.round(chance.normal(scale=GRID, size=SIZE)).astype(np.int64)


def correlation(captured, update):
    return abs(np.corrcoef(captured.astype(np.float64), update.astype(np.float64))[0, 1])


def captured_attempt(updates, noise, *, dropouts):
    """Each site's upload, and copies of the masks that it used."""
    partnership = Partnership.of(len(updates), dropouts=dropouts, task=replace(TASK, size=SIZE))
    coordinator, commitments = partnership.committed()
    uploads, masks = {}, {}
    for site, machine in partnership.sites.items():
        machine.confirm(commitments)
        masks[site] = [Mask(seed=bytearray(mask.seed), negative=mask.negative) for mask in machine._attempt.masks]
        uploads[site] = machine.mask(updates[site] + noise[site])
        coordinator.accept_vector(site, uploads[site].document, uploads[site].vector)
    return partnership, coordinator, {site: upload.vector for site, upload in uploads.items()}, masks


def without(vector, masks):
    return apply_masks(vector, [Mask(seed=mask.seed, negative=not mask.negative) for mask in masks])


@pytest.mark.parametrize("dropouts", [0, 1])
def test_masked_vectors_say_nothing_of_any_update_and_unmasked_ones_do(chance, dropouts):
    updates = {site: integers(chance) for site in names(5)}
    noise = {site: integers(chance) for site in names(5)}
    _, _, captured, masks = captured_attempt(updates, noise, dropouts=dropouts)
    limit = SIGMAS / np.sqrt(SIZE)
    for seen, vector in captured.items():
        # Even for one who knows the noise.
        bare = vector - noise[seen]
        for update in updates.values():
            assert correlation(bare, update) < limit
            assert correlation(vector, update) < limit
        unmasked = without(vector, masks[seen]) - noise[seen]
        assert correlation(unmasked, updates[seen]) > 1 - 1e-9
        np.testing.assert_array_equal(unmasked, updates[seen])


def test_every_bit_of_a_masked_vector_is_as_often_one_as_zero():
    nothing = {site: np.zeros(SIZE, dtype=np.int64) for site in names(3)}
    _, _, captured, _ = captured_attempt(nothing, nothing, dropouts=0)
    for vector in captured.values():
        bits = np.unpackbits(vector.view(np.uint8)).reshape(SIZE, 64)
        assert np.abs(bits.mean(axis=0) - 0.5).max() < SIGMAS * 0.5 / np.sqrt(SIZE)


def test_a_total_that_lacks_one_site_says_nothing_of_the_others(chance):
    updates = {site: integers(chance) for site in names(4)}
    nothing = {site: np.zeros(SIZE, dtype=np.int64) for site in names(4)}
    _, _, captured, _ = captured_attempt(updates, nothing, dropouts=0)
    for missing in names(4):
        partial = sum(vector for site, vector in captured.items() if site != missing)
        for update in updates.values():
            assert correlation(partial, update) < SIGMAS / np.sqrt(SIZE)
    np.testing.assert_array_equal(sum(captured.values()), sum(updates.values()))


def test_a_vector_kept_back_from_recovery_stays_hidden_by_its_self_mask(chance):
    # The coordinator has everybody's vector, calls one site vanished, and is told the shares of that site's key.
    updates = {site: integers(chance) for site in names(4)}
    nothing = {site: np.zeros(SIZE, dtype=np.int64) for site in names(4)}
    partnership, coordinator, captured, masks = captured_attempt(updates, nothing, dropouts=1)
    victim = names(4)[1]
    del coordinator._vectors[victim]
    partnership.voted(coordinator)
    partnership.revealed(coordinator)
    key = coordinator._vanished_key(victim)
    agreed = coordinator._agreement()
    parties = {
        site: Party(site=site, public_key=bytes.fromhex(commitment.public_key))
        for site, commitment in agreed.commitments.items()
    }
    pairs = [
        pair_mask(key, own=parties[victim], other=party, transcript=agreed.transcript)
        for site, party in parties.items()
        if site != victim
    ]
    stripped = without(captured[victim], pairs)
    assert correlation(stripped, updates[victim]) < SIGMAS / np.sqrt(SIZE)
    # Only the self mask was left, and it is the one thing nobody reveals of that site.
    np.testing.assert_array_equal(without(stripped, masks[victim][-1:]), updates[victim])
