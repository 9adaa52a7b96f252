"""Embeddings against diffusers'."""

import numpy as np
import pytest

from ldm_jax.models.embedding import gaussian_fourier_embedding, sincos_position_embedding, timestep_embedding

torch = pytest.importorskip("torch")
embeddings = pytest.importorskip("diffusers.models.embeddings")
pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(
    ("dim", "flip", "shift", "period"), [(256, True, 0, 10000), (32, False, 1, 10000), (7, True, 0.5, 50)]
)
def test_timestep_embedding(dim, flip, shift, period):
    t = np.array([0, 0.5, 17, 999], np.float32)
    theirs = embeddings.get_timestep_embedding(
        torch.tensor(t), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift, max_period=period
    )
    mine = timestep_embedding(t, dim, float(period), flip, float(shift))
    np.testing.assert_allclose(mine, theirs.numpy(), atol=2e-4)  # f32 angles of 999 radians


@pytest.mark.parametrize("flip", [False, True])
def test_gaussian_fourier(flip):
    theirs = embeddings.GaussianFourierProjection(8, scale=4, log=False, flip_sin_to_cos=flip)
    t = np.array([-2.0, 0.1, 1.5], np.float32)
    mine = gaussian_fourier_embedding(t, theirs.weight.detach().numpy(), flip)
    np.testing.assert_allclose(mine, theirs(torch.tensor(t)).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize(("grid", "base", "scale"), [((4, 4), 4, 1.0), ((6, 10), 8, 2.0)])
def test_position_embedding(grid, base, scale):
    theirs = embeddings.get_2d_sincos_pos_embed(24, grid, base_size=base, interpolation_scale=scale, output_type="pt")
    np.testing.assert_allclose(sincos_position_embedding(24, *grid, base, scale), theirs.numpy(), atol=1e-5)
