"""From noise to images: the end of the grid, and options of samplers and grids by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.process import PROCESSES
from ldm_jax.training import sampling
from ldm_jax.training.conditioning import Conditioning

POINT = 0.3


def model(name):
    """The exact network of a distribution that is one point."""

    class Net:
        @staticmethod
        def apply(variables, x, t, cond):
            return jnp.full_like(x, POINT)

    return sampling.Model(Net, Conditioning(0, None, None), None, PROCESSES[name](), "x", (2, 2, 3))


def draw(model, **settings):
    settings = sampling.Settings(**{"name": "euler", "steps": 8, **settings})
    generate = jax.jit(sampling.make_generate(model, settings))
    keys = sampling.image_keys(0, np.arange(3))
    times = sampling.make_times(model, settings)
    return np.asarray(generate({"denoiser": {}}, {}, keys, {}, times, jnp.float32(1)))


@pytest.mark.parametrize("name", ["vp_linear", "ve", "edm"])
def test_an_image_holds_no_noise_where_the_grid_ends_early(name):
    np.testing.assert_allclose(draw(model(name)), POINT, atol=1e-4)


def test_options_reach_the_sampler_and_the_grid():
    plain, noisy = (draw(model("vp_linear"), name="ddim", options=o) for o in ({}, {"eta": 1.0}))
    assert np.abs(plain - noisy).max() < 1e-4  # one point: both end there
    # Where the network halves what it sees, another path ends elsewhere.
    halved = model("vp_linear")
    halved.denoiser.apply = staticmethod(lambda variables, x, t, cond: 0.5 * x)
    plain, noisy = (draw(halved, name="ddim", options=o) for o in ({}, {"eta": 1.0}))
    assert np.abs(plain - noisy).max() > 1e-2
    m = model("edm")
    grids = [sampling.make_times(m, sampling.Settings(grid="karras", grid_options=o)) for o in ({}, {"rho": 3.0})]
    assert np.abs(grids[0] - grids[1]).max() > 1e-3


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"name": "ddim", "options": {"etta": 1.0}}, "sampler 'ddim' has no option 'etta'"),
        ({"grid": "karras", "grid_options": {"roh": 1.0}}, "grid 'karras' has no option 'roh'"),
        ({"steps": 0}, "steps is 0"),
        ({"t_lo": 0.7, "t_hi": 0.5}, "guidance interval"),
    ],
)
def test_what_cannot_be_is_named(settings, said):
    with pytest.raises(ValueError, match=said):
        sampling.check(sampling.Settings(**settings))
