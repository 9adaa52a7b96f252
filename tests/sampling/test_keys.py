"""Initial noise and the noise of steps: of each item and each seed its own."""

import jax
import numpy as np
import pytest

from ldm_jax.sampling import keys


def test_seeds_that_agree_in_their_lower_32_bits_draw_other_noise():
    made = [np.asarray(keys.noise(keys.numbered(seed, 2), (2, 2, 1))) for seed in (5, 2**32 + 5, 2**63 + 5)]
    assert len({row.tobytes() for noise in made for row in noise}) == 6
    np.testing.assert_array_equal(made[1][1], keys.noise(keys.numbered(2**32 + 5, 1, first=1), (2, 2, 1))[0])
    steps = [keys.step_keys(keys.numbered(seed, 2)) for seed in (5, 2**32 + 5, 5)]
    assert (steps[0] != steps[1]).all() and (steps[0] == steps[2]).all()
    assert (steps[0] != keys.step_keys(keys.numbered(5, 2), use=2)).all()


def test_the_initial_noise_is_not_that_of_the_steps():
    rows, shape = keys.numbered(5, 3), (2, 2, 1)
    noise = keys.noise(rows, shape)
    np.testing.assert_array_equal(noise[2], jax.random.normal(jax.random.fold_in(rows[2], 0), shape))
    assert (noise[2] != jax.random.normal(keys.step_keys(rows)[2], shape)).all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_one_line(seed):
    with pytest.raises(ValueError, match=rf"seed={seed}; expected a whole number from 0 to 2\*\*64 - 1"):
        keys.numbered(seed, 1)
