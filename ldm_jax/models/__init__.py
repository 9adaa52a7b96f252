"""Networks (flax.linen), including the feature extractors of losses and metrics. Linen modules are defined in this folder only.

    MODELS[name](**config_block)                        a network that a config names
    inputs(module), init(module, key), shapes(module)   what any of these networks takes, and its variables

Each network is one line of NETWORKS. Its file has the class, and a function `inputs(module, shape=None)` for its arguments.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models import (
    autoencoder_kl,
    autoencoder_tiny,
    classifier,
    clip,
    dinov2,
    discriminator,
    dit,
    fsq,
    inception,
    lpips,
    noisy_classifier,
    text,
    unet,
    vq,
)

# (name in configs, or None where no config names it; class; inputs).
NETWORKS: tuple[tuple[str | None, type, Callable[..., dict[str, Any]]], ...] = (
    ("autoencoder_kl", autoencoder_kl.AutoencoderKL, autoencoder_kl.inputs),
    ("autoencoder_tiny", autoencoder_tiny.AutoencoderTiny, autoencoder_tiny.inputs),
    ("classifier", classifier.Classifier, classifier.inputs),
    ("dit", dit.DiT, dit.inputs),
    ("fsq", fsq.FSQModel, autoencoder_kl.inputs),
    ("noisy_classifier", noisy_classifier.NoisyClassifier, noisy_classifier.inputs),
    ("text", text.TextEncoder, text.inputs),
    ("unet", unet.UNet, unet.inputs),
    ("vq", vq.VQModel, autoencoder_kl.inputs),
    (None, clip.CLIP, clip.inputs),
    (None, clip.CLIPText, clip.text_inputs),
    (None, clip.CLIPVision, clip.vision_inputs),
    (None, dinov2.Dinov2, dinov2.inputs),
    (None, discriminator.PatchDiscriminator, discriminator.inputs),
    (None, inception.InceptionV3, inception.inputs),
    (None, lpips.LPIPS, lpips.inputs),
)
MODELS: dict[str, type] = {name: network for name, network, _ in NETWORKS if name is not None}
INPUTS: dict[type, Callable[..., dict[str, Any]]] = {network: takes for _, network, takes in NETWORKS}


def inputs(module: nn.Module, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """{argument of module's `__call__`: jax.ShapeDtypeStruct}, for a batch of one; `cond` is a dict of them.

    `shape` is the shape of one item of the first argument: (H, W, C) of an image, (L,) of a prompt. None stands for the smallest shape
    that the network takes, or for its only one. Optional arguments (train, mask, optional entries of `cond`) are left out.
    Raises ValueError for a module whose type is not in INPUTS, and for one whose options do not fix the width of an input.
    """
    if type(module) not in INPUTS:
        names = ", ".join(network.__name__ for network in INPUTS)
        raise ValueError(
            f"{type(module).__name__}: what it takes is not known; expected a type of models.INPUTS: {names}"
        )
    return INPUTS[type(module)](module, shape)


def init(module: nn.Module, key: jax.Array, shape: tuple[int, ...] | None = None) -> Any:
    """The variables {'params': ..., ...} of a new network. `shape` as in `inputs`; it matters only to learned positions."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs(module, shape))
    return module.init(key, **zeros)


def shapes(module: nn.Module, shape: tuple[int, ...] | None = None) -> Any:
    """The variables that `init` gives, as jax.ShapeDtypeStruct. Nothing is computed, however large the network is."""
    return jax.eval_shape(module.init, jax.random.key(0), **inputs(module, shape))
