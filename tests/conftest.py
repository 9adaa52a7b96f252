"""Shared set-up of the tests: CPU with the compilation cache on, and the folder of real data."""

import gc
import os
import pathlib
import shutil
import signal
import tempfile

# Runs and checkpoints of the tests are many small files. In memory they cost half of what they cost on a disk.
MEMORY = pathlib.Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
# Before jax is imported anywhere: the cache turns a 15-second compile into one second on the second run.
CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "ldm_jax_test_cache")
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tests compile much and compute little. These flags make a compilation three to five times shorter than XLA's defaults do: no
# optimisation by LLVM, no MLIR emitters of fusions, no copies of the module for threads that the other worker keeps busy, and the
# cheaper of two analyses of copies. They change last bits between programs of different shapes; see `exact_programs`.
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_llvm_force_inline_before_split=false",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_copy_insertion_use_region_analysis=true",
)
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# One heap for all threads (kernels/heap.py) makes steps faster and compilations half as long again. Any setting of malloc in the
# environment keeps it off.
os.environ.setdefault("MALLOC_TOP_PAD_", "16777216")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

from tests.durations import (  # noqa: E402, F401 (hooks of pytest)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)

# Each lowering makes an MLIR context and loads all dialects into it: a quarter of the time of a small program. Here some hundred
# programs share one. A context keeps what was ever made in it, so it is changed now and then.
_new_context, _context, _programs = mlir.make_ir_context, None, 0


def _shared_context():
    global _context, _programs
    if _programs % 500 == 0:
        _context = _new_context()
    _programs += 1
    return _context


mlir.make_ir_context = _shared_context

# Traced programs are large graphs of small objects: the default makes a twentieth of the whole run garbage collection.
gc.set_threshold(50_000, 20, 50)

# A shell starts its background jobs with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C would see nothing.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ldm_data() -> pathlib.Path:
    """The folder named by LDM_DATA; the test is skipped with the reason when there is none."""
    folder = os.environ.get("LDM_DATA", "")
    if not folder:
        pytest.skip(
            "LDM_DATA is unset: it names the folder that holds cifar10_jpeg.zip, emoji128.zip, caltech101_128.zip"
        )
    path = pathlib.Path(folder)
    if not path.is_dir():
        pytest.skip(f"LDM_DATA={folder} is not a folder")
    return path


@pytest.fixture
def exact_programs(monkeypatch):
    """Programs of different shapes do the same arithmetic on a row, to the last bit: XLA's emitters of fusions compile them.

    FLAGS turns these emitters off, since they make a compilation three times as long.
    """
    options_of = compiler.get_compile_options

    def with_emitters(*args, env_options_overrides=None, **options):
        overrides = {**(env_options_overrides or {}), "xla_cpu_use_fusion_emitters": True}
        return options_of(*args, env_options_overrides=overrides, **options)

    monkeypatch.setattr(compiler, "get_compile_options", with_emitters)
    jax.clear_caches()
    yield
    jax.clear_caches()
