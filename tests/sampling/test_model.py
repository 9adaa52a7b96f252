"""Between levels of 8 bits and [-1, 1]."""

import jax.numpy as jnp
import numpy as np

from ldm_jax.sampling.model import from_uint8, to_uint8


def test_levels_are_rounded_to_the_nearest():
    levels = np.arange(256, dtype=np.uint8)
    x = from_uint8(levels)
    assert (x[0], x[255]) == (-1, 1)
    for off in (-0.4, 0.0, 0.4):
        np.testing.assert_array_equal(to_uint8(x + off / 127.5), levels)
    assert to_uint8(jnp.asarray([-3.0, 3.0])).tolist() == [0, 255]
