"""What a term of an autoencoder's loss is, and what it is computed from.

    loss = nll + sum_l w_l l(z) + sum_i w_i i(y),      nll = E exp(-s) + s,      E = mean over images of sum_e w_e e(x, y)

with x images, z latents, y = decode(z), s a learned variance or 0, and e, l, i the terms `of` 'error', 'latent' and 'image'.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array


class Seen(NamedTuple):
    """What a term is computed from.

    x           images f32[B, H, W, 3] in [-1, 1]
    key         key of the step. A term that draws folds a number into it that no other uses: equivariance 1, the codebook 2
    variables   TrainState.variables before the step
    y           reconstructions f32[B, H, W, 3] of x; None for terms of the latent
    z, decode   latents f32[B, h, w, D], and decode(z) -> images; None for the other terms
    penalties   {name: f32[B]}, what the latents cost: KL divergence, errors of the codebook
    """

    x: Array
    key: Array | None = None
    variables: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    y: Array | None = None
    z: Array | None = None
    decode: Callable[[Array], Array] | None = None
    penalties: dict[str, Array] = {}  # noqa: RUF012


class Term(NamedTuple):
    """One summand of an autoencoder's loss, and everything that belongs to it.

    name        in the metrics; of its block in config.task, if it has one
    of          'error': f32[B] of x and y, scaled by the learned variance; 'latent': of z; 'image': f32[] of y
    loss        loss(params, frozen, seen) -> f32[B] or f32[]. A term of 'latent' is differentiated in its parameters too. Those of
                a term of 'image' are trained by `opponent` instead
    weight      in the loss, times ramp(step) -> f32[]
    balance     'encoder' or 'decoder': the weight is multiplied by |grad_K nll| / |grad_K loss|, K the kernel of that half's last
                convolution (`balanced`); '': it is not
    validated   whether validation's loss contains a term of the latent, whose value is then f32[B]. It contains every error
    frozen      parameters that it reads and nobody trains
    network     name of its parameters in the state; '' for none. `optimizer` trains them
    init        init(key, x, z) -> (parameters, variables) of the network at images x and latents z. It folds a number into the key
                that no other uses: alignment 1, adversarial 2
    opponent    opponent(params, variables, x, y) -> (loss f32[], (metrics, variables)), which the network minimizes
                beside the autoencoder
    """

    name: str
    of: str
    loss: Callable[[Any, Any, Seen], Array]
    weight: float = 1.0
    ramp: Callable[[Array], Array] | None = None
    balance: str = ""
    validated: bool = False
    frozen: Any = None
    network: str = ""
    init: Callable[[Array, Array, Array], tuple[Any, dict[str, Any]]] | None = None
    optimizer: optax.GradientTransformation | None = None
    opponent: Callable[..., tuple[Array, tuple[dict[str, Array], dict[str, Any]]]] | None = None

    def weight_at(self, step: Array) -> Array:
        """`weight` at a step, f32[]."""
        return jnp.float32(self.weight) * (1.0 if self.ramp is None else self.ramp(step))


def balanced(g_nll: Array, g_term: Array) -> Array:
    """|g_nll| / (|g_term| + 1e-4) of two gradients of one shape, within [0, 1e4]: f32[] (Esser et al. 2021, eq. 7)."""
    return jnp.clip(jnp.linalg.norm(g_nll.ravel()) / (jnp.linalg.norm(g_term.ravel()) + 1e-4), 0.0, 1e4)


def check_weight(key: str, weight: float) -> None:
    """Raise ValueError for the weight of a block config.task.KEY that is not positive."""
    if not weight > 0:
        raise ValueError(f"task.{key}.weight is {weight!r}; expected a number above 0 (no block at all for none)")
