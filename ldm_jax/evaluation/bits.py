"""Bits a dimension of real images under a diffusion model in pixels, a bound on what a lossless code by it takes.

Exact likelihood of uniformly dequantised images by the probability-flow ODE, the divergence by one Rademacher probe an image (Song et
al. 2021, arXiv:2011.13456, equations 39 and 40, appendix D.2; Theis et al. 2016, arXiv:1511.01844, section 3.1). A conditional model
is told each image's own class and caption; nothing is guided. The density is that of the process at `bits_start`, where a trace of
noise is left.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.subset import spread
from ldm_jax.diffusion import likelihood
from ldm_jax.diffusion.denoiser import make_denoiser
from ldm_jax.diffusion.grids import kl_optimal
from ldm_jax.diffusion.process import inverse_log_snr
from ldm_jax.kernels import heap, mesh
from ldm_jax.training import conditioning as conditions
from ldm_jax.training import experiment, sampling

# sigma / alpha where the path begins, if the process does not begin with more: an eighth of a level of uint8.
LEAST_NOISE = 1e-3


def bits(run: experiment.Restored, *, num: int, steps: int, seed: int) -> dict[str, Any]:
    """{'bits': mean over `num` reporting images, 'bits_error': its standard error, and what it depends on}.

    `steps` of fourth order, equal in the angle atan(sigma / alpha): four evaluations and as many products with the Jacobian each.
    Image i draws its dequantisation and its probe by `seed` and i alone. The model is one of pixels.
    """
    model = run.model
    report = spread(experiment.source(run.config, "report"), num)
    learned = {"learned_variance": model.learned_variance}

    def apply(params, x, t, cond):
        return model.denoiser.apply({"params": params}, x, t, cond)

    def one_batch(params, batch, keys, times):
        cond = conditions.condition(model.conditioning, params, batch)
        denoise = make_denoiser(apply, params["denoiser"], model.process, model.prediction, cond, **learned)
        noise, probes = (jax.vmap(lambda key, k=k: jax.random.fold_in(key, k))(keys) for k in (0, 1))
        x = likelihood.dequantise(noise, batch["image"])
        log_p = likelihood.log_likelihood(denoise, model.process, x, times, probes, divergence=likelihood.hutchinson())
        return likelihood.bits_per_dim(log_p, x[0].size, bin_width=2 / 256)

    device_mesh = mesh.make_mesh()
    by_row, replicated = mesh.batch_sharding(device_mesh), mesh.replicated(device_mesh)
    shardings = {"in_shardings": (replicated, by_row, by_row, replicated), "out_shardings": by_row}
    compiled, params = heap.settled(jax.jit(one_batch, **shardings)), jax.device_put(run.params, replicated)
    keys_of = jax.jit(lambda rows: sampling.image_keys(seed, rows), out_shardings=by_row)
    # Where sigma is 0 a network that predicts x says nothing of eps.
    start = float(inverse_log_snr(model.process, jnp.float32(-2 * np.log(LEAST_NOISE))))
    times = kl_optimal(model.process, steps, end=max(start, model.process.t_min))[::-1]
    size, values = experiment.rows(device_mesh, min(run.config.sampler.batch_size, len(report))), []
    for n, batch in enumerate(experiment.one_pass(run.config, report, size)):
        valid = batch.pop("valid")
        keys = keys_of(np.arange(n * size, (n + 1) * size))
        found = compiled(params, mesh.shard_global(batch, device_mesh), keys, times)
        values.append(np.float64(mesh.to_host(found))[valid])
    values = np.concatenate(values)
    return {
        "bits": float(values.mean()),
        "bits_error": float(values.std(ddof=1) / np.sqrt(len(values))),
        "bits_num": len(values),
        "bits_split": run.config.split.report,
        "bits_steps": steps,
        "bits_start": float(times[0]),
    }
