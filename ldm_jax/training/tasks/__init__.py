"""The tasks by name, one file (or folder) a task: make(context, **block) -> Task. A new task is a file and a line here."""

from collections.abc import Callable

from ldm_jax.training.task import Task
from ldm_jax.training.tasks import autoencoder, classifier, diffusion, tiny_autoencoder

TASKS: dict[str, Callable[..., Task]] = {
    "autoencoder": autoencoder.make,
    "classifier": classifier.make,
    "diffusion": diffusion.make,
    "tiny_autoencoder": tiny_autoencoder.make,
}
