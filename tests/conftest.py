"""Shared set-up of the tests: CPU with the compilation cache on, and the folder of real data."""

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
# Tests compile much and compute little: the lowest optimisation halves a cold run and changes no result that is tested; kernels
# that are not inlined into one another compile faster still.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_llvm_force_inline_before_split=false"
)
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402

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
