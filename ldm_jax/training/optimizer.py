"""Optimizers and learning-rate schedules by name, with durations in images.

adamw: Loshchilov & Hutter 2019; adam: Kingma & Ba 2015; muon: Jordan et al. 2024 (orthogonalised momentum for matrices, AdamW for
the rest); lion: Chen et al. 2023; sgd with momentum. Schedules: warm-up, then constant, cosine (Loshchilov & Hutter
2017), linear, or inverse square root (EDM2, eq. 67: lr / sqrt(max(images / decay_images, 1))).
"""

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt")


def make_schedule(
    learning_rate: float,
    *,
    schedule: str = "constant",
    warmup_images: int = 0,
    total_images: int,
    decay_images: int = 0,
    batch_size: int,
    final: float = 0.0,
) -> optax.Schedule:
    """Step count -> learning rate. `final`: the fraction of the peak at the end of cosine and linear."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown; there are {', '.join(SCHEDULES)}")
    if schedule == "inverse_sqrt" and decay_images <= 0:
        raise ValueError("schedule inverse_sqrt needs optimizer.decay_images > 0")

    def rate(count):
        images = jnp.asarray(count, jnp.float32) * batch_size
        # (images + batch) so that the first step already moves.
        warm = jnp.minimum(1.0, (images + batch_size) / max(warmup_images, batch_size))
        progress = jnp.clip((images - warmup_images) / max(total_images - warmup_images, 1), 0.0, 1.0)
        shape = {
            "constant": jnp.float32(1.0),
            "cosine": final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": final + (1 - final) * (1 - progress),
            "inverse_sqrt": 1 / jnp.sqrt(jnp.maximum(images / max(decay_images, 1), 1.0)),
        }[schedule]
        return learning_rate * warm * shape

    return rate


def _adamw(rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def _adam(rate, *, b1=0.9, b2=0.999, eps=1e-8):
    return optax.adam(rate, b1=b1, b2=b2, eps=eps)


def _muon_axes(params):
    """Which matrices Muon orthogonalises: every `kernel`, all axes but the last taken as inputs; a scanned stack of matrices
    (three axes) layer by layer. Embedding tables, biases and norms are left to AdamW."""

    def axes(path, leaf):
        if not str(getattr(path[-1], "key", path[-1])).endswith("kernel") or leaf.ndim < 2:
            return None
        first = 1 if leaf.ndim == 3 else 0
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def _muon(rate, *, beta=0.95, weight_decay=0.0, adam_learning_rate_ratio=1.0, b1=0.9, b2=0.95):
    """Muon updates are scaled to AdamW's RMS (Liu et al. 2025, eq. 4), so one learning rate serves both halves."""

    def adam_rate(count):
        return adam_learning_rate_ratio * rate(count)

    return optax.contrib.muon(
        rate,
        beta=beta,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_learning_rate=adam_rate,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_muon_axes,
    )


def _lion(rate, *, b1=0.9, b2=0.99, weight_decay=0.0):
    return optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay)


def _sgd(rate, *, momentum=0.9, nesterov=True, weight_decay=0.0):
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum, nesterov=nesterov))


OPTIMIZERS = {"adamw": _adamw, "adam": _adam, "muon": _muon, "lion": _lion, "sgd": _sgd}


def make_optimizer(
    name: str = "adamw",
    *,
    learning_rate: float,
    batch_size: int,
    total_images: int,
    schedule: str = "constant",
    warmup_images: int = 0,
    decay_images: int = 0,
    final: float = 0.0,
    clip_norm: float = 0.0,
    **hyper: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation and its schedule. `clip_norm` 0: no clipping by global norm; `hyper`: the optimizer's own.

    Raises ValueError on an unknown name and TypeError on a keyword that the optimizer does not have.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is unknown; there are {', '.join(OPTIMIZERS)}")
    rate = make_schedule(
        learning_rate,
        schedule=schedule,
        warmup_images=warmup_images,
        total_images=total_images,
        decay_images=decay_images,
        batch_size=batch_size,
        final=final,
    )
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm > 0 else []
    return optax.chain(*parts, OPTIMIZERS[name](rate, **hyper)), rate
