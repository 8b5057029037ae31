"""What networks run on: names of devices, and memory that is short."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.settings import SiteSettings
from clients.templates import SiteValues, site_yaml
from fedgrade.errors import DataRefused, DocumentRefused, JobRefused
from fedgrade.model.compute import Chunks, Compute, arithmetic, enough_memory, require_device, torch_device
from fedgrade.trust.canonical import decode_yaml

SITE = site_yaml(
    SiteValues(
        site="north", photos="photos", lineage="pumps", cohort="2026", manifest="manifest.csv", declared_items=400,
        photos_per_item=3,
    )
)  # fmt: skip


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_devices_have_these_names(device):
    require_device(device)
    assert decode_yaml(SiteSettings, SITE.replace("device: auto", f"device: {device}").encode()).device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:01", "cuda:0 ", "CUDA", "", "cuda:1000"])
def test_and_no_others(device):
    with pytest.raises(JobRefused, match="cuda:N is expected"):
        Compute(device=device, threads=1)
    with pytest.raises(DocumentRefused, match=r"site\.device: .* cuda:N is expected"):
        decode_yaml(SiteSettings, SITE.replace("device: auto", f'device: "{device}"').encode())


def test_the_processor_is_always_there():
    assert torch_device("cpu") == "cpu"


def test_caches_tell_precisions_and_kinds_of_device_apart_and_not_one_gpu_from_another():
    assert arithmetic("cpu", "float32") == ""
    words = [arithmetic("cpu", "float16"), arithmetic("cuda:0", "float32"), arithmetic("cuda:0", "float16")]
    assert len({"", *words}) == 4
    assert arithmetic("cuda:1", "float16") == arithmetic("cuda:0", "float16")


def doubled(most):
    """A computation that asks for more memory than there can be as soon as it is given more than ``most`` photos."""
    sizes = []

    def compute(photos):
        sizes.append(len(photos))
        if len(photos) > most:
            # 2^62 bytes: more than any address space has. A real MemoryError, and not one that is made up.
            np.empty(2**62, dtype=np.uint8)
        return photos * 2

    return compute, sizes


def parts(chunks, compute, batch):
    return chunks.each(compute, batch, exhausted=(MemoryError,), release=lambda: None)


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_whatever_fits_the_numbers_are_those_of_the_whole(photos, at_once, most):
    compute, _ = doubled(most)
    batch = np.arange(photos, dtype=np.float32)[:, None]
    computed = parts(Chunks("here", at_once=at_once), compute, batch)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 1), np.float32), *computed]), batch * 2)


def test_memory_that_is_short_halves_what_is_held_from_then_on_and_says_so(caplog):
    compute, sizes = doubled(3)
    chunks, batch = Chunks("features on cuda:0", at_once=8), np.zeros((10, 1), np.float32)
    with caplog.at_level(logging.WARNING):
        parts(chunks, compute, batch)
        parts(chunks, compute, batch[:4])
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "features on cuda:0: memory is short; from here on 4 photos at once",
        "features on cuda:0: memory is short; from here on 2 photos at once",
    ]


def test_where_not_even_one_photo_fits_the_device_is_named_and_no_other_is_fallen_back_on():
    compute, sizes = doubled(0)
    released = []
    with pytest.raises(DataRefused, match="features on cuda:1: its memory does not hold one photo"):
        Chunks("features on cuda:1", at_once=4).each(
            compute, np.zeros((4, 1), np.float32), exhausted=(MemoryError,), release=lambda: released.append(1)
        )
    assert sizes == [4, 2, 1]
    assert len(released) == 3


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_network_that_a_device_does_not_hold_is_one_line_that_names_it_and_what_to_do(device):
    said = f"network on {device}: its memory does not hold it; free some, .*smaller model"
    with pytest.raises(DataRefused, match=said) as refused, enough_memory(device):
        np.empty(2**62, dtype=np.uint8)
    # On the processor already, there is no other device to name.
    assert ("`device: cpu`" in str(refused.value)) == (device != "cpu")


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def compute(_photos):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parts(Chunks("here"), compute, np.zeros((1, 1), np.float32))
