"""A published pipeline as one value: its parts, and what can be asked of it."""

from ldm_jax.pipelines.components import Parts
from ldm_jax.pipelines.image_to_image import image_to_image, invert, vary
from ldm_jax.pipelines.inpaint import inpaint
from ldm_jax.pipelines.instruct import edit
from ldm_jax.pipelines.text_to_image import interpolate, text_to_image
from ldm_jax.pipelines.unconditional import draw


class Pipeline(Parts):
    """Parts with the functions that draw from them as methods; `load` makes one."""

    text_to_image = text_to_image
    interpolate = interpolate
    image_to_image = image_to_image
    invert = invert
    vary = vary
    inpaint = inpaint
    edit = edit
    draw = draw
