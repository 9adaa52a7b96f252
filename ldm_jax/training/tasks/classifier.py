"""Image classifier: the feature extractor of `fd_classifier`, and what says whether a sample shows its class.

    loss = cross entropy with label smoothing (Szegedy et al. 2016, sec. 7)

Training images are flipped, shifted by up to `shift` pixels (reflected at the border) and have a square cut out (DeVries &
Taylor 2017), all on the device from the step's key.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax import models
from ldm_jax.training.images import from_uint8
from ldm_jax.training.state import create
from ldm_jax.training.step import make_step, value_and_grad
from ldm_jax.training.task import Context, Figures, Kind, Task


def shift_images(x: jax.Array, key: jax.Array, shift: int) -> jax.Array:
    """Each image of f32[B, H, W, C] moved by an offset in [-shift, shift]^2, borders reflected."""
    size = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    offsets = jax.random.randint(key, (x.shape[0], 2), 0, 2 * shift + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), size))(padded, offsets)


def cut_out(x: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """A square of `size` pixels at a random place of each image set to 0 (mid-grey)."""
    batch, height, width, _ = x.shape
    corner = jax.random.randint(key, (batch, 2), 0, jnp.array([height - size + 1, width - size + 1]))
    rows = jnp.arange(height)[None, :, None] - corner[:, :1, None]
    columns = jnp.arange(width)[None, None, :] - corner[:, None, 1:]
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    return jnp.where(inside[..., None], 0.0, x)


def make(context: Context, *, label_smoothing: float = 0.1, shift: int = 4, cutout: int = 0) -> Task:
    """Task that trains `context.network`(x) -> (logits, features) under the name 'classifier'. Batches: image u8, label i32.

    `label_smoothing`: the share of the target that is spread over all classes; `shift`, `cutout`: pixels, 0 for none.
    Raises ValueError for a square that is larger than the image.
    """
    network, space = context.network, context.space
    side = space.shape[0]
    if cutout > side:
        raise ValueError(f"task.cutout is {cutout}; expected at most the resolution, {side}")
    optimizers = {"classifier": context.optimizer()}

    def init(key):
        k_params, k_state = jax.random.split(key)
        params = {"classifier": models.init(network, k_params, space.shape)["params"]}
        return create(k_state, params, optimizers, context.averages)

    def loss(params, state, frozen, batch, key):
        del state, frozen
        k_shift, k_cut, k_drop = jax.random.split(key, 3)
        x = from_uint8(batch["image"])
        if shift:
            x = shift_images(x, k_shift, shift)
        if cutout:
            x = cut_out(x, k_cut, cutout)
        logits, _ = network.apply({"params": params["classifier"]}, x, train=True, rngs={"dropout": k_drop})
        target = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), label_smoothing)
        error = jnp.mean(optax.softmax_cross_entropy(logits, target))
        right = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        return error, {"loss": error, "accuracy": right}, {}

    step = make_step(context, value_and_grad(loss), optimizers)

    def validate(params, frozen, batch, key):
        del frozen, key
        logits, _ = network.apply({"params": params["classifier"]}, from_uint8(batch["image"]))
        error = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"val_loss": error, "val_accuracy": (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)}

    return Task(init, step, validate)


def check_classes(network: Any, label: bool, num_classes: int) -> None:
    """Raise ValueError unless the network has as many classes as the data."""
    del label
    if network.num_classes != num_classes:
        raise ValueError(f"config.model.num_classes={network.num_classes}, but the data has {num_classes} classes")


# A classifier is measured on all real images of its reporting split, by its own features.
FIGURES = Figures("real", None, "classifier:{workdir}")
KIND = Kind(make, network="classifier", figures=FIGURES, check_classes=check_classes)
