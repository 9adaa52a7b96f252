"""The class of an image, as an index; the null is the class index num_classes (Ho & Salimans 2021)."""

import numpy as np

from ldm_jax.training.conditioning import Condition
from ldm_jax.training.task import Context


def make(context: Context) -> Condition:
    """config.condition.label: cond['label'] i32[B] of 'label' i32[B]."""
    return Condition(
        "label",
        read=lambda frozen, batch, keys: batch["label"],
        encode=lambda params, frozen, label: {"label": label},
        null=np.int32(context.num_classes),
        needs=("label",),
        takes=("labels",),
    )
