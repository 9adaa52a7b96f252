"""What comes before any work, on the command line and from Python alike: the compilation cache, and libraries that keep quiet."""

import logging
import os

import absl.logging
import jax
from jax.experimental.compilation_cache import compilation_cache


def start() -> None:
    """Keep compiled programs in ~/.cache/ldm_jax/jit (18 s become 1 s on the second run), and silence what absl and orbax log.

    What is set already stays: a folder of the cache (JAX_COMPILATION_CACHE_DIR or jax.config), a verbosity other than absl's default.
    Called by `ldm`, by training.loop.train, and by whatever loads a run or a pipeline; twice does nothing.
    """
    if absl.logging.get_verbosity() == absl.logging.WARNING:
        absl.logging.set_verbosity(absl.logging.ERROR)
        logging.getLogger("absl").setLevel(logging.ERROR)
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "ldm_jax", "jit"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        # jax looks once, at the first program; a notebook has compiled something by now.
        compilation_cache.reset_cache()
