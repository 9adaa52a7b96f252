"""The tasks by name, one file (or folder) a task. A new task is a file with its KIND, and a line here."""

from ldm_jax.training.task import Kind
from ldm_jax.training.tasks import autoencoder, classifier, diffusion, noisy_classifier, tiny_autoencoder

TASKS: dict[str, Kind] = {
    "autoencoder": autoencoder.KIND,
    "classifier": classifier.KIND,
    "diffusion": diffusion.KIND,
    "noisy_classifier": noisy_classifier.KIND,
    "tiny_autoencoder": tiny_autoencoder.KIND,
}
