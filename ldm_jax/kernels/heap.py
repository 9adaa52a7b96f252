"""A heap for XLA on a CPU: freed memory stays with the process, and what the compiler leaves behind does not slow the steps.

XLA takes the temporary buffers of a program from malloc at each execution and frees them at its end. glibc maps every block
above 32 MiB and unmaps it when it is freed, so the kernel hands out and clears the same pages at each step: 48,000 page
faults a step of a small autoencoder, a quarter of its processor time (benchmarks/README.md). Three settings of mallopt(3) end
that: no mappings, nothing returned from the top of the heap, and one heap for all threads (the heaps of other threads hold
64 MiB at most, and fall back to mappings).

Compiling fills that one heap with holes, 230,000 of them for a U-Net, and malloc then walks long lists of holes that are too
small, at each of a step's allocations and with all threads waiting: 6.5 s a step instead of 4.1. `settle` takes the holes
out of malloc's lists.

The price is memory: XLA asks for blocks aligned to 64 bytes, and a freed one, whose edges small blocks have taken by then, does not fit
the next request of its size. The heap settles at two to four copies of a program's temporaries. A process that runs a few large
programs, each for seconds, leaves the heap as it is.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
_LARGEST_HOLE, _SMALLEST_HOLE = 1 << 28, 1 << 10  # below 1 KiB malloc keeps a list for each size, and never walks

_kept = False


class _Counts(ctypes.Structure):
    """struct mallinfo2, glibc >= 2.33."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
        libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
        libc.mallinfo2.restype = _Counts
        return libc
    except (OSError, AttributeError):
        return None


def keep() -> bool:
    """Tell glibc to keep freed memory; True if it was told. Before the first big array: threads keep the heaps they have.

    Nothing is done, and False returned, where there is no glibc >= 2.33, or where the environment sets malloc up already
    (GLIBC_TUNABLES, MALLOC_..., or another malloc by LD_PRELOAD).
    """
    global _kept
    if any(name in ("GLIBC_TUNABLES", "LD_PRELOAD") or name.startswith("MALLOC_") for name in os.environ):
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    _kept = _libc() is not None and all(_libc().mallopt(name, value) == 1 for name, value in settings)
    return _kept


def settle() -> int:
    """Give the pages of all holes in a kept heap back to the kernel, and take the holes away; how many they were.

    They are allocated for good, which costs addresses and no memory. Call it after something big was compiled; half a second.
    A heap that is not kept only gives its pages back.
    """
    if (libc := _libc()) is None:
        return 0
    libc.malloc_trim(0)
    if not _kept:
        return 0
    holes, size = 0, _LARGEST_HOLE
    top = libc.sbrk(0) - libc.mallinfo2().keepcost
    while size >= _SMALLEST_HOLE:
        while (block := libc.malloc(size)) and block < top:
            holes += 1
        libc.free(block)
        size = size * 7 // 8
    return holes


def settled(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same jitted function, which settles the heap when its first call has compiled it."""
    calls = 0

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        nonlocal calls
        out = compiled(*args)
        calls += 1
        if calls == 1:
            settle()
        return out

    return run
