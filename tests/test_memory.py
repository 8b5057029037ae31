"""Large buffers are used again: counted in pages that the kernel had to clear, in a process of their own."""

import ctypes
import subprocess
import sys

import pytest

from fedgrade.memory import keep_large_buffers

BUFFERS, BUFFER_PAGES = 50, 2048
PROGRAM = f"""
import mmap, resource, sys
from fedgrade.memory import keep_large_buffers
if sys.argv[1] == "keep":
    assert keep_large_buffers()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range({BUFFERS}):
    first = bytes(bytearray({BUFFER_PAGES} * mmap.PAGESIZE))
    del first
print(faults() - before)
"""


def page_faults(what):
    said = subprocess.run([sys.executable, "-c", PROGRAM, what], check=True, capture_output=True, text=True)
    return int(said.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_buffers_of_megabytes_cost_their_pages_once_and_not_each_time():
    assert page_faults("keep") < 4 * BUFFER_PAGES
    assert page_faults("leave") > BUFFERS * BUFFER_PAGES / 2


def test_a_c_library_without_the_switch_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_large_buffers()
