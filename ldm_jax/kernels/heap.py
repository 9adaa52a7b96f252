"""Settings of malloc for XLA on a CPU: the process keeps memory that is freed, and the compiler's leftovers do not slow the steps.

At each execution XLA takes the temporary buffers of a program from malloc, and frees them at the end. glibc maps each block above 32
MiB and unmaps it when it is freed. So the kernel hands out and clears the same pages at each step: a small autoencoder has 48,000
page faults a step, which take a quarter of its processor time (benchmarks/README.md). Three settings of mallopt(3) avoid this: malloc
maps no blocks, it returns nothing from the top of the heap, and all threads share one heap (the heap of another thread holds at most
64 MiB, and malloc maps what does not fit there).

Compiling fills that one heap with holes, 230,000 of them for a U-Net. At each allocation of a step malloc then walks long lists of
holes that are too small, while all threads wait: a step takes 6.5 s instead of 4.1. `settle` takes the holes out of malloc's lists.

This costs memory. XLA asks for blocks that are aligned to 64 bytes. When such a block is freed, small blocks soon take its edges, and
the next request of the same size does not fit there. The heap grows to two to four times the temporary buffers of a program. A
process that runs a few large programs, each for some seconds, should therefore not call `keep`.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
_LARGEST_HOLE, _SMALLEST_HOLE = 1 << 28, 1 << 10  # below 1 KiB malloc has a list for each size, and does not walk it

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
    """Make glibc keep freed memory; whether it does. Call this before the first large array: a thread keeps the heap that it has.

    Does nothing and returns False where there is no glibc >= 2.33, and where the environment already configures malloc
    (GLIBC_TUNABLES, MALLOC_..., or another malloc by LD_PRELOAD).
    """
    global _kept
    if any(name in ("GLIBC_TUNABLES", "LD_PRELOAD") or name.startswith("MALLOC_") for name in os.environ):
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    _kept = _libc() is not None and all(_libc().mallopt(name, value) == 1 for name, value in settings)
    return _kept


def settle() -> int:
    """Give the pages of all holes of the heap back to the kernel, take the holes out of malloc's lists, and return their number.

    The holes are allocated for ever, which costs addresses but no memory. Call this after something large was compiled; it takes half
    a second. Does nothing without `keep`.
    """
    if not _kept:
        return 0
    libc = _libc()
    libc.malloc_trim(0)
    holes, size = 0, _LARGEST_HOLE
    top = libc.sbrk(0) - libc.mallinfo2().keepcost
    while size >= _SMALLEST_HOLE:
        while (block := libc.malloc(size)) and block < top:
            holes += 1
        libc.free(block)
        size = size * 7 // 8
    return holes


def settled(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same jitted function. After its first call, which compiles it, it calls `settle`."""
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
