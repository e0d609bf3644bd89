import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from parallel.host_memory import keep_freed_memory

def faulted_mib():
    for _ in range(15):  # aligned blocks grow the heap a few times before one fits where another was
        torch.ones(10 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(10 << 20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20

default = faulted_mib()
assert keep_freed_memory()
print(default, faulted_mib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
def test_a_block_is_not_faulted_in_again() -> None:
    """In a process of its own: the setting holds for the rest of a process."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    default, kept = map(int, result.stdout.split())
    assert kept < 10  # of 200 MiB touched
    assert default > 150, "malloc now keeps blocks by itself; host_memory.py can go"
