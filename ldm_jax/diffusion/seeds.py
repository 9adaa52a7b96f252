"""Seeds of 64 bits: each has a jax key that no other seed has.

jax.random.key silently drops the upper 32 bits of a seed, unless jax computes in 64 bits: seeds 5 and 2**32 + 5 would draw the same
noise.
"""

import operator

import jax
import numpy as np

BOUND = 2**64
EXPECTED = "expected a whole number from 0 to 2**64 - 1"


def check(name: str, seed: int) -> int:
    """The seed as a Python int. ValueError that names it unless it is a whole number from 0 to 2**64 - 1."""
    try:
        value = operator.index(seed)
    except TypeError:
        raise ValueError(f"{name}={seed!r}; {EXPECTED}") from None
    if not 0 <= value < BOUND:
        raise ValueError(f"{name}={value}; {EXPECTED}")
    return value


def key(seed: int) -> jax.Array:
    """key[] of a seed from 0 to 2**64 - 1, as jax.random.key makes it where jax computes in 64 bits. ValueError for another seed.

    Threefry's key is the pair of words (high, low) of the seed itself, so two seeds never have the same key; below 2**32 it is
    jax.random.key(seed).
    """
    seed = check("seed", seed)
    low = jax.random.key(np.uint32(seed % 2**32))
    # Other generators seed themselves with the same pair, once or several times.
    words = jax.random.key_data(low).at[0::2].set(np.uint32(seed >> 32))
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(low))
