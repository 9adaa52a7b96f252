"""models/rope.py against the rotary embedding of diffusers' Flux."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

from diffusers.models.embeddings import apply_rotary_emb  # noqa: E402
from diffusers.models.transformers.transformer_flux import FluxPosEmbed  # noqa: E402

from ldm_jax.models.rope import axial_angles, grid_positions, rotate  # noqa: E402


def test_three_axes_as_in_flux():
    r = np.random.RandomState(0)
    grid = grid_positions(3, 5)
    positions = np.concatenate([np.zeros((len(grid), 1), np.float32), grid], axis=1)
    x = r.randn(2, len(grid), 2, 16).astype(np.float32)
    table = FluxPosEmbed(theta=10000, axes_dim=[4, 4, 8])(torch.from_numpy(positions))
    expected = apply_rotary_emb(torch.from_numpy(x), table, sequence_dim=1).numpy()
    got = rotate(x, axial_angles(positions, (4, 4, 8), 10000.0))
    np.testing.assert_allclose(got, expected, atol=2e-6)
