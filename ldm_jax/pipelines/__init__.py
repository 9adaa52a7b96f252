"""Published pipelines: weights, networks and diffusion put together.

pipeline = load(folder)
images = pipeline.text_to_image(["a fox in the snow"], steps=30, guidance=7.5)     # f32[N, H, W, 3] in [0, 1]
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from ldm_jax import startup
from ldm_jax.pipelines import components, latents, published
from ldm_jax.pipelines.pipeline import Pipeline
from ldm_jax.pipelines.request import Request, Sizes
from ldm_jax.pipelines.start import pictures
from ldm_jax.weights import hub

__all__ = ["Pipeline", "Request", "Sizes", "load", "pictures"]


def load(
    path: str | pathlib.Path,
    dtype: str | None = None,
    *,
    offload: bool = False,
    tile: int | None = None,
    tokenizer: str | pathlib.Path | None = None,
    prediction: str | None = None,
    kind: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Pipeline:
    """The pipeline in a folder with model_index.json, in a single file, or of a name, 'hub:OWNER/NAME'.

    dtype    'float32' or 'bfloat16': of the parameters and of what they compute; None: as in the files, computing in float32
    offload  keep the parameters in the host's memory and bring one part to the device at a time
    tile     encode and decode pictures in tiles of so many pixels, where memory is short: the seams can be seen

    tokenizer, prediction, kind, options: for a single file, what it cannot tell (components.load_file)

    Raises ValueError for whatever is missing, damaged, unknown or not supported, by name.
    """
    if dtype not in (None, "float32", "bfloat16"):
        # In float16 the published autoencoders leave its range.
        raise ValueError(f"dtype is {dtype!r}, expected 'float32' or 'bfloat16'")
    startup.start()
    path = hub.resolve(path)
    file_options = {"tokenizer": tokenizer, "prediction": prediction, "kind": kind, "options": options}
    if path.is_file():
        parts = components.load_file(path, dtype=dtype, offload=offload, **file_options)
    elif superfluous := [name for name, value in file_options.items() if value is not None]:
        raise ValueError(f"{superfluous[0]} is for single files; {path} is a folder, which has its own")
    else:
        parts = components.load(path, dtype, offload=offload)
    return Pipeline(*published.drawable(tiled(parts, tile)))


def tiled(parts: components.Parts, tile: int | None) -> components.Parts:
    """The parts with this `tile`. ValueError for an autoencoder that is not tiled, and for pixels that it does not divide."""
    if tile is None:
        return parts
    vae = None if parts.autoencoder is None else parts.autoencoder.module
    what = "without an autoencoder" if vae is None else f"with a {type(vae).__name__}"
    latents.check_tile(tile, vae, f"a pipeline {what}")
    return parts._replace(tile=tile)
