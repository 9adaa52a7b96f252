"""The compute dtype in which this machine is fast."""

import functools
import pathlib

import jax


@functools.cache
def has_amx(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX: Sapphire Rapids and later); False where `cpuinfo` does not exist."""
    path = pathlib.Path(cpuinfo)
    return path.is_file() and "amx_bf16" in path.read_text(errors="replace").split()


def best_dtype() -> str:
    """'bfloat16' on TPU, GPU and CPUs with AMX; 'float32' on any other CPU, where bf16 is emulated and slower."""
    return "bfloat16" if jax.default_backend() != "cpu" or has_amx() else "float32"
