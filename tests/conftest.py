"""Shared set-up of the tests: CPU with the compilation cache on, and the folder of real data."""

import gc
import os
import pathlib
import signal
import tempfile

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

import pytest  # noqa: E402

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
