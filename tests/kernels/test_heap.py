"""The heap that keeps what was freed: counted in the kernel's page faults, which no timing blurs."""

import os
import subprocess
import sys
import textwrap

import pytest

CLEAN = {
    k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k not in ("GLIBC_TUNABLES", "LD_PRELOAD")
}
SCRIPT = textwrap.dedent("""
    import resource, sys
    from ldm_jax.kernels import heap
    kept_memory = heap.keep() if sys.argv[1] == "keep" else False
    import jax, jax.numpy as jnp

    @jax.jit
    def f(x):
        return jnp.sin(x @ x.T).sum()  # the product is a temporary of 64 MiB

    x = jnp.ones((4096, 16))
    for _ in range(10):  # the heap grows until it has room between what else it holds
        f(x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        f(x).block_until_ready()
    print(kept_memory, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
""")


def faults(what, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what], env=CLEAN | environment, capture_output=True, text=True, check=True
    )
    kept_memory, count = done.stdout.split()
    return kept_memory == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the page faults of Linux")
def test_a_kept_heap_is_not_faulted_in_again():
    kept_memory, kept = faults("keep")
    if not kept_memory:
        pytest.skip("no glibc here")
    _, mapped = faults("plain")
    assert mapped > 10_000, "64 MiB are 16,384 pages: without keep() each execution faults them in"
    assert kept < mapped / 4


def test_what_the_environment_says_about_malloc_is_left_alone():
    assert faults("keep", MALLOC_ARENA_MAX="2")[0] is False


HOLES = textwrap.dedent("""
    import ctypes, random, sys
    from ldm_jax.kernels import heap
    kept_memory = heap.keep() if sys.argv[1] == "keep" else False
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    random.seed(0)
    blocks = [libc.malloc(random.randrange(2_000, 50_000)) for _ in range(10_000)]
    for block in blocks[::2]:  # each hole lies between two blocks that stay
        libc.free(block)
    print(kept_memory, heap.settle(), heap.settle())
""")


def test_holes_in_a_kept_heap_are_taken_away():
    def run(what):
        done = subprocess.run(
            [sys.executable, "-c", HOLES, what], env=CLEAN, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    kept_memory, first, again = run("keep")
    if kept_memory == "False":
        pytest.skip("no glibc here")
    assert int(first) > 5_000 and int(again) < 100
    assert run("leave")[1:] == ["0", "0"]
