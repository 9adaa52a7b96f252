"""Latents that resemble the features of a frozen vision network (VA-VAE: Yao et al. 2025, arXiv:2501.01423, section 3.2).

    z' = W z                                                            eq. 1
    cosine     mean_ij relu(1 - m1 - cos(z'_ij, f_ij))                  eq. 2, m1 = 0.5
    distance   mean_ij relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m2)       eq. 3, m2 = 0.25
    loss       weight |grad_E nll| / |grad_E (cosine + distance)| (cosine + distance)        eq. 4 and 5

with f the network's features of the same image at the latent's resolution, i and j pixels of one image, W learned and E the kernel of
the encoder's last convolution. DINOv2 sees the image at the size at which its patches are the latent's pixels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.dinov2 import Dinov2
from ldm_jax.models.lpips import unit
from ldm_jax.training.task import Context
from ldm_jax.training.terms.perceptual import activations
from ldm_jax.training.terms.term import Term, check_weight

COSINE_MARGIN, DISTANCE_MARGIN = 0.5, 0.25
# ImageNet's, of pixels in [0, 1]: what DINOv2 was trained on.
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def init_projection(key: jax.Array, latent: int, features: int) -> dict[str, jax.Array]:
    """W as {'kernel': f32[latent, features]}, so that z' has about the size of z."""
    return {"kernel": jax.random.normal(key, (latent, features)) / latent**0.5}


def alignment(params: dict[str, jax.Array], z: jax.Array, features: jax.Array) -> jax.Array:
    """cosine + distance, f32[], of latents f32[B, h, w, D] and features f32[B, h', w', C], resized where h' is not h."""
    f = jax.image.resize(features, (*z.shape[:3], features.shape[-1]), "linear")
    projected, z, f = (unit(a.reshape(len(a), -1, a.shape[-1])) for a in (z @ params["kernel"], z, f))
    cosine = jax.nn.relu(1.0 - COSINE_MARGIN - jnp.sum(projected * f, -1))
    among = [jnp.einsum("bic,bjc->bij", a, a) for a in (z, f)]
    return jnp.mean(cosine) + jnp.mean(jax.nn.relu(jnp.abs(among[0] - among[1]) - DISTANCE_MARGIN))


# features(params, x f32[B, H, W, 3] in [-1, 1], side) -> f32[B, h, w, C], with h and w about `side`, the latent's.
Features = Callable[[Any, jax.Array, int], jax.Array]


def load_features(name: str, load: Callable[[str], tuple[Any, Any]]) -> tuple[Features, Any]:
    """The features of a frozen network, and its parameters. Of a classifier they are the last residual branch."""
    network, params = load(name)
    if name.startswith("classifier:"):

        def features(params, x, side):
            return activations(network, params, x)[f"residual_{len(network.widths) - 1}_b_norm"]
    else:
        if not isinstance(network, Dinov2):
            raise ValueError(f"task.align.name is {name!r}, which holds a {type(network).__name__}; expected Dinov2")

        def features(params, x, side):
            pixels = jax.image.resize(x, (len(x), side * network.patch_size, side * network.patch_size, 3), "cubic")
            tokens = network.apply({"params": params}, ((pixels + 1) / 2 - MEAN) / STD).last_hidden_state
            return tokens[:, -side * side :].reshape(len(x), side, side, -1)

    return features, params


def make(context: Context, *, name: str, weight: float = 0.1) -> Term | None:
    """config.task.align: `name` is 'dinov2:DIR', a folder of save_pretrained, or 'classifier:DIR', a run; None where context.load is.

    Its network 'align' is W. Raises ValueError for another name, a weight that is not positive, and a folder that holds something else.
    """
    kind, _, where = name.partition(":")
    if kind not in ("dinov2", "classifier") or not where:
        raise ValueError(f"task.align.name is {name!r}; expected dinov2:DIR or classifier:DIR, a run of `ldm train`")
    check_weight("align", weight)
    if context.load is None:
        return None
    features, frozen = load_features(name, context.load)

    def init(key, x, z):
        shape = jax.eval_shape(lambda x: features(frozen, x, z.shape[1]), x).shape
        return init_projection(jax.random.fold_in(key, 1), z.shape[-1], shape[-1]), {}

    def loss(params, frozen, seen):
        return alignment(params, seen.z, features(frozen, seen.x, seen.z.shape[1]))

    return Term(
        "align",
        "latent",
        loss,
        weight,
        balance="encoder",
        frozen=frozen,
        network="align",
        init=init,
        optimizer=context.optimizer(),
    )
