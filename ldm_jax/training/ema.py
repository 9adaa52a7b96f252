"""Exponential moving averages of parameters, with half-lives in images.

    ema <- beta ema + (1 - beta) params,     beta = 0.5 ** (batch / half_life)

after Karras et al. 2022 (EDM), appendix F.2: a half-life in images means the same at any batch size. With `ramp` > 0 the
half-life is at most `ramp` times the images seen so far, so that a short run's average is not its initialisation.
"""

from typing import Any

import jax
import jax.numpy as jnp


def update(emas: dict[str, Any], params: Any, images: jax.Array, batch_size: int, ramp: float) -> dict[str, Any]:
    """One step of every average. `images` f32[]: seen before this step; `params` mirrors each average's tree."""
    out = {}
    for key, tree in emas.items():
        half_life = jnp.float32(key)
        if ramp > 0:
            half_life = jnp.minimum(half_life, ramp * images)
        beta = jnp.exp2(-batch_size / jnp.maximum(half_life, 1e-8))
        out[key] = jax.tree.map(lambda e, p, beta=beta: e + (1 - beta) * (p - e), tree, params)
    return out
