"""Initial noise and the noise of steps: of each image and each seed its own."""

import numpy as np
import pytest

from ldm_jax.pipelines import latents
from ldm_jax.training import sampling


def test_seeds_that_agree_in_their_lower_32_bits_draw_other_noise():
    made = [np.asarray(latents.noise(seed, 2, (2, 2, 1))) for seed in (5, 2**32 + 5, 2**63 + 5)]
    assert len({row.tobytes() for noise in made for row in noise}) == 6
    np.testing.assert_array_equal(made[1][1], latents.noise(2**32 + 5, 1, (2, 2, 1), first=1)[0])
    for keys in (latents.step_keys, lambda seed, n: sampling.image_keys(seed, np.arange(n))):
        assert (keys(5, 2) != keys(2**32 + 5, 2)).all() and (keys(5, 2) == keys(5, 2)).all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_one_line(seed):
    with pytest.raises(ValueError, match=rf"seed={seed}; expected a whole number from 0 to 2\*\*64 - 1"):
        latents.noise(seed, 1, (2, 2, 1))
