"""Freed memory stays with the process, so that a step on a CPU does not fault its buffers in anew.

XLA takes the temporary buffers of a program from malloc at each execution and frees them at its end. glibc maps every block
above 32 MiB and unmaps it when it is freed, so the kernel hands out and clears the same pages at each step: 48,000 page
faults a step of a small autoencoder, a quarter of its processor time (benchmarks/README.md). Three settings of mallopt(3) end
that: no mappings, nothing returned from the top of the heap, and one heap for all threads (the heaps of other threads hold
64 MiB at most, and fall back to mappings).
"""

import ctypes
import os

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep() -> bool:
    """Tell glibc to keep freed memory; True if it was told. Before the first big array: threads keep the heaps they have.

    Nothing is done, and False returned, where there is no glibc, or where the environment sets malloc up already
    (GLIBC_TUNABLES, MALLOC_..., or another malloc by LD_PRELOAD).
    """
    if any(name in ("GLIBC_TUNABLES", "LD_PRELOAD") or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
