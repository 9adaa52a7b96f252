"""Networks (flax.linen): the only room that knows flax. `MODELS[name](**config_block)` builds one."""

from ldm_jax.models.autoencoder_kl import AutoencoderKL
from ldm_jax.models.classifier import Classifier
from ldm_jax.models.dit import DiT
from ldm_jax.models.text import TextEncoder
from ldm_jax.models.unet import UNet

MODELS: dict[str, type] = {
    "autoencoder_kl": AutoencoderKL,
    "classifier": Classifier,
    "dit": DiT,
    "text": TextEncoder,
    "unet": UNet,
}
