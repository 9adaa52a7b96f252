"""Networks (flax.linen): the only room that knows flax. `MODELS[name](**config_block)` builds one."""

from ldm_jax.models.autoencoder_kl import AutoencoderKL
from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
from ldm_jax.models.classifier import Classifier
from ldm_jax.models.dit import DiT
from ldm_jax.models.fsq import FSQModel
from ldm_jax.models.text import TextEncoder
from ldm_jax.models.unet import UNet
from ldm_jax.models.vq import VQModel

MODELS: dict[str, type] = {
    "autoencoder_kl": AutoencoderKL,
    "autoencoder_tiny": AutoencoderTiny,
    "classifier": Classifier,
    "dit": DiT,
    "fsq": FSQModel,
    "text": TextEncoder,
    "unet": UNet,
    "vq": VQModel,
}
