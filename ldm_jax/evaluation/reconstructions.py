"""Reconstructions of real images by an autoencoder: a run's, or a published one.

A latent is the most likely one, the posterior's mean.
"""

import pathlib
from typing import Any

import jax
import numpy as np

from ldm_jax.data.subset import spread
from ldm_jax.evaluation import images
from ldm_jax.kernels import mesh
from ldm_jax.models.autoencoder_kl import Posterior
from ldm_jax.runs import checkpoint
from ldm_jax.training import first_stage, streams
from ldm_jax.training.experiment import Experiment
from ldm_jax.training.images import from_uint8, to_uint8


def of_run(workdir: pathlib.Path, config: Experiment, step: int, average: str | None, num: int) -> images.Images:
    """Reconstructions of `num` reporting images by a run's checkpoint: see `of_network`."""
    params = checkpoint.restore_params(workdir, step, average)["autoencoder"]
    made_by = {"step": step, "checkpoint": checkpoint.identity(workdir, step), "ema": average or "none"}
    return of_network(config, config.network, params, made_by, num)


def of_published(stage: first_stage.FirstStage, config: Experiment, num: int) -> images.Images:
    """Reconstructions of `num` reporting images of the config by a published autoencoder: see `of_network`."""
    made_by = {"autoencoder": str(stage.published.path), "encoder": stage.sha256, "decoder": stage.decoder}
    return of_network(config, stage.network, stage.params, made_by, num)


def of_network(config: Experiment, network: Any, params: Any, made_by: dict[str, Any], num: int) -> images.Images:
    """Reconstructions of `num` reporting images, evenly spread, by the autoencoder `network`.

    Besides 'image', a batch holds 'original' u8[b, H, W, 3] and the latent 'mean' f32[b, h, w, C]; of a posterior also its 'std' and
    'nats' f[b], KL(posterior || N(0, I)); of a codebook the 'indices' i[b, h, w]. Batches are split over all devices of all processes,
    and each process decodes its own rows.
    """
    report = spread(streams.source(config, "report"), num)
    num, side = len(report), config.input.resolution

    def encode_and_decode(params, pixels):
        out = first_stage.moments(network, params, from_uint8(pixels))
        if "std" in out:
            out["nats"] = Posterior(out["mean"], 2 * jax.numpy.log(out["std"])).kl()
        if hasattr(network, "num_vq_embeddings"):
            out["indices"] = network.apply({"params": params}, out["mean"], method="quantized").indices
        y = network.apply({"params": params}, out["mean"], method="decode")
        return {**out, "image": to_uint8(y), "original": pixels}

    holds = jax.eval_shape(encode_and_decode, params, np.zeros((1, side, side, 3), np.uint8)).keys()
    device_mesh = mesh.make_mesh()
    run = jax.jit(encode_and_decode, out_shardings=mesh.batch_sharding(device_mesh))

    def batches():
        placed = jax.device_put(params, mesh.replicated(device_mesh))
        for batch in images.sharded(config, report, streams.rows(device_mesh, images.BATCH), device_mesh):
            out, valid = mesh.to_host((run(placed, batch["image"]), batch["valid"]))
            yield {name: value[valid] for name, value in out.items()}

    return images.Images(batches, num, made_by | {"images": "reconstructions"}, frozenset(holds))
