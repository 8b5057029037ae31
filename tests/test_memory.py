"""Large buffers are used again: counted in pages that the kernel had to clear, in a process of their own."""

import ctypes
import os
import subprocess
import sys

import pytest

from fedgrade.memory import keep_large_buffers

# With huge pages a page fault would clear hundreds of pages at once.
PROGRAM = """
import ctypes, resource, sys
from fedgrade.memory import keep_large_buffers
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
if sys.argv[1] == "keep":
    assert keep_large_buffers()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(50):
    buffers = bytes(bytearray(8 * 2**20))
    del buffers
print(faults() - before)
"""


def page_faults(what):
    # What an operator sets for malloc would hold for both.
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    said = subprocess.run([sys.executable, "-c", PROGRAM, what], check=True, capture_output=True, text=True, env=plain)
    return int(said.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_buffers_of_megabytes_cost_their_pages_once_and_not_each_time():
    assert page_faults("keep") < page_faults("leave") / 10


def test_a_c_library_without_the_switch_is_no_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_large_buffers()
