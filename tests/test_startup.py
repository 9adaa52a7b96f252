"""From a notebook as from the command line: programs are kept, and what the user has set stays."""

import absl.logging
import jax
import pytest

from ldm_jax import startup
from ldm_jax.training import restore


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process in which nothing is set; afterwards the one that the tests run in."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    verbosity = absl.logging.get_verbosity()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    absl.logging.set_verbosity(absl.logging.WARNING)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    absl.logging.set_verbosity(verbosity)
    startup.compilation_cache.reset_cache()


def test_programs_are_kept_even_after_the_first_was_compiled(fresh):
    startup.compilation_cache.reset_cache()
    jax.jit(lambda x: x + 1)(1.0)
    startup.start()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.jit(lambda x: x * 3 - 2)(1.0)
    assert list((fresh / "ldm_jax" / "jit").iterdir())
    assert absl.logging.get_verbosity() == absl.logging.ERROR


def test_what_is_set_stays(fresh):
    jax.config.update("jax_compilation_cache_dir", str(fresh / "own"))
    absl.logging.set_verbosity(absl.logging.INFO)
    startup.start()
    assert jax.config.jax_compilation_cache_dir == str(fresh / "own")
    assert absl.logging.get_verbosity() == absl.logging.INFO


def test_what_loads_a_run_starts_it(fresh):
    with pytest.raises(FileNotFoundError):
        restore.restore(fresh / "none")
    assert jax.config.jax_compilation_cache_dir == str(fresh / "ldm_jax" / "jit")
