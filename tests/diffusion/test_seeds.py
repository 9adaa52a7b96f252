"""Seeds of 64 bits: jax's own keys, none of them shared by two seeds."""

import jax
import numpy as np
import pytest

from ldm_jax.diffusion import seeds

SOME = (0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 5 * 2**32, 2**63, 2**63 + 5, 2**64 - 1)


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_each_seed_has_the_key_that_jax_gives_it_in_64_bits(generator):
    with jax.default_prng_impl(generator):
        ours = [jax.random.key_data(seeds.key(seed)) for seed in SOME]
        with jax.enable_x64(True):
            theirs = [jax.random.key_data(jax.random.key(np.uint64(seed))) for seed in SOME]
        np.testing.assert_array_equal(ours, theirs)
        assert len({words.tobytes() for words in map(np.asarray, ours)}) == len(SOME)
        # What was drawn before seeds had 64 bits stays as it was.
        np.testing.assert_array_equal(ours[4], jax.random.key_data(jax.random.key(2**32 - 1)))


def test_a_key_is_the_seed_itself_so_no_two_seeds_share_one():
    words = [np.asarray(jax.random.key_data(seeds.key(seed)), np.uint64) for seed in SOME]
    assert [int(high) * 2**32 + int(low) for high, low in words] == list(SOME)


def test_keys_are_the_same_inside_a_compiled_function():
    inside = jax.jit(lambda i: jax.random.fold_in(seeds.key(2**40 + 3), i))(7)
    outside = jax.random.fold_in(seeds.key(2**40 + 3), 7)
    np.testing.assert_array_equal(jax.random.key_data(inside), jax.random.key_data(outside))


@pytest.mark.parametrize("seed", [-1, 2**64, 10**23, 0.5, "3", None])
def test_other_seeds_are_refused_by_name(seed):
    with pytest.raises(ValueError, match=r"--seed=.*; expected a whole number from 0 to 2\*\*64 - 1"):
        seeds.check("--seed", seed)
    with pytest.raises(ValueError, match=r"^seed="):
        seeds.key(seed)
