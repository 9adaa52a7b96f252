"""Latent diffusion research in JAX and Flax.

    run = ldm_jax.load("runs/quickstart")     a run, a published pipeline or an autoencoder as one object: sample, encode, denoiser, ...
    run = ldm_jax.train("configs/quickstart.py", "runs/quickstart")

docs/python.md shows what such an object does. Neither name imports jax before it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_jax.entry import load, train

__version__ = "0.1.0"
__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ldm_jax import entry

        return getattr(entry, name)
    raise AttributeError(f"module 'ldm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
