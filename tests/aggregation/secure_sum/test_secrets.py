"""What is left of secrets after they were used, and what printing shows of them before."""

import secrets as operating_system

import pytest

from fedgrade.aggregation.secure_sum import site as site_module
from fedgrade.aggregation.secure_sum.masks import Mask, apply_masks
from fedgrade.aggregation.secure_sum.states import Over
from fedgrade.errors import MessageRefused
from tests.aggregation.secure_sum.partnership import Partnership, names, numbers


def buffers(state):
    """Every secret buffer that a state holds."""
    masks = [mask.seed for mask in getattr(state, "masks", ())]
    held = [
        share
        for one in (getattr(state, "held", None) or getattr(state, "own", {})).values()
        for share in (one.key, one.seed)
    ]
    return [buffer for buffer in (*masks, *held, getattr(state, "seed", bytearray())) if buffer]


def test_seeds_are_zero_once_the_vector_is_masked_and_shares_once_revealed():
    partnership = Partnership.of(4, dropouts=1)
    coordinator, commitments = partnership.committed()
    seeds = {}
    for site, machine in partnership.sites.items():
        machine.confirm(commitments)
        seeds[site] = [mask.seed for mask in machine._attempt.masks]
        assert all(any(seed) for seed in seeds[site])
        upload = machine.mask(numbers(site))
        assert not any(any(seed) for seed in seeds[site])
        coordinator.accept_vector(site, upload.document, upload.vector)
    partnership.voted(coordinator)
    votes, machine = coordinator.votes(), partnership.sites[names(1)[0]]
    shares = buffers(machine._attempt)
    assert len(shares) == 8
    assert all(any(share) for share in shares)
    machine.reveal(votes)
    assert not any(any(share) for share in shares)
    assert isinstance(machine._attempt, Over)


@pytest.mark.parametrize("phase", ["committed", "confirmed", "masked", "voted"])
@pytest.mark.parametrize("end", ["forget", "next attempt"])
def test_an_attempt_that_is_given_up_or_overtaken_leaves_zeros(phase, end):
    partnership = Partnership.of(4, dropouts=1)
    coordinator, commitments = partnership.committed()
    if phase != "committed":
        for site, machine in partnership.sites.items():
            machine.confirm(commitments)
            if phase != "confirmed":
                upload = machine.mask(numbers(site))
                coordinator.accept_vector(site, upload.document, upload.vector)
    if phase == "voted":
        partnership.voted(coordinator)
    held = [buffer for machine in partnership.sites.values() for buffer in buffers(machine._attempt)]
    assert held
    if end == "forget":
        for machine in partnership.sites.values():
            machine.forget()
    else:
        partnership.attempt(1).committed()
    assert not any(any(buffer) for buffer in held)


def test_without_recovery_nothing_is_held_after_the_vector_has_left():
    partnership = Partnership.of(3)
    partnership.masked()
    assert all(isinstance(machine._attempt, Over) for machine in partnership.sites.values())


def test_a_crash_while_masking_leaves_no_masks_for_a_second_vector(monkeypatch):
    partnership = Partnership.of(3)
    _, commitments = partnership.committed()
    machine = partnership.sites[names(1)[0]]
    machine.confirm(commitments)
    seeds = buffers(machine._attempt)
    with monkeypatch.context() as patch:
        patch.setattr(site_module, "apply_masks", out_of_memory)
        with pytest.raises(MemoryError):
            machine.mask(numbers(names(1)[0]))
    assert not any(any(seed) for seed in seeds)
    with pytest.raises(MessageRefused, match="out of order"):
        machine.mask(numbers(names(1)[0]))


def out_of_memory(*_):
    raise MemoryError


def test_a_mask_that_was_wiped_hides_nothing_and_is_refused():
    mask = Mask(seed=bytearray(b"s" * 32), negative=False)
    mask.wipe()
    with pytest.raises(MessageRefused, match="used and wiped"):
        apply_masks(numbers(names(1)[0]), [mask])


def test_secrets_do_not_print():
    partnership = Partnership.of(4, dropouts=1)
    _, commitments = partnership.committed()
    machine = partnership.sites[names(1)[0]]
    committed = machine._attempt
    machine.confirm(commitments)
    secret_texts = [repr(bytes(buffer))[2:-1] for state in (committed, machine._attempt) for buffer in buffers(state)]
    printed = repr(committed) + repr(machine._attempt) + repr(machine._attempt.masks) + repr(machine.__dict__)
    assert not any(text in printed for text in secret_texts)
    assert repr(Mask(seed=bytearray(b"seed"), negative=False)) == "Mask(<secret>)"


def test_seeds_come_from_the_operating_system():
    assert site_module.secrets is operating_system
    seeds = set()
    for _ in range(3):
        partnership = Partnership.of(4, dropouts=1)
        partnership.committed()
        seeds |= {bytes(machine._attempt.seed) for machine in partnership.sites.values()}
    assert len(seeds) == 12
