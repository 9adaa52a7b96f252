"""The metric bits: bits a dimension of real images under a diffusion model in pixels.

It is the exact likelihood of uniformly dequantised images by the probability-flow ODE, the divergence by one Rademacher probe an image
(Song et al. 2021, arXiv:2011.13456, equations 39 and 40, appendix D.2; Theis et al. 2016, arXiv:1511.01844, section 3.1), which
bounds the length of a lossless code by this model. A conditional model is conditioned on the class and the caption of each image;
nothing is guided. The density is that of the process at the time `bits_start`, where a little noise is left.
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
from ldm_jax.evaluation import images
from ldm_jax.evaluation.metrics import PIXELS, Case, Figure, Metric, Need
from ldm_jax.kernels import heap, mesh
from ldm_jax.training import conditioning, restore, sampling, streams

# sigma / alpha where the path begins, if the process does not begin with more: an eighth of a level of uint8.
LEAST_NOISE = 1e-3


def bits(run: restore.Restored, *, num: int, steps: int, seed: int) -> dict[str, Any]:
    """{'bits': mean over `num` reporting images, 'bits_error': its standard error, and what it depends on}.

    `steps` of fourth order, equal in the angle atan(sigma / alpha): four evaluations and as many products with the Jacobian each.
    Image i draws its dequantisation and its probe by `seed` and i alone. The model is one of pixels.
    """
    model = run.model
    report = spread(streams.source(run.experiment, "report"), num)
    learned = {"learned_variance": model.learned_variance}

    def apply(params, x, t, cond):
        return model.denoiser.apply({"params": params}, x, t, cond)

    def one_batch(params, batch, keys, times):
        cond = conditioning.condition(model.conditioning, params, batch)
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
    # At sigma = 0 the prediction of x does not determine eps.
    start = float(inverse_log_snr(model.process, jnp.float32(-2 * np.log(LEAST_NOISE))))
    times = kl_optimal(model.process, steps, end=max(start, model.process.t_min))[::-1]
    size, values = streams.rows(device_mesh, min(run.experiment.sample_batch_size, len(report))), []
    for n, batch in enumerate(images.sharded(run.experiment, report, size, device_mesh)):
        valid = batch.pop("valid")
        keys = keys_of(np.arange(n * size, (n + 1) * size))
        value, valid = mesh.to_host((compiled(params, batch, keys, times), valid))
        values.append(np.float64(value)[valid])
    values = np.concatenate(values)
    return {
        "bits": float(values.mean()),
        "bits_error": float(values.std(ddof=1) / np.sqrt(len(values))),
        "bits_num": len(values),
        "bits_split": run.experiment.split.report,
        "bits_steps": steps,
        "bits_start": float(times[0]),
    }


def steps(case: Case) -> int:
    """The steps of --steps, or of the sampler in the run's config."""
    return case.options.get("steps") or case.config.sampler.steps


METRIC = Metric(
    names=("bits",),
    of=PIXELS,
    help="bits a dimension of the reporting images, by the probability-flow ODE",
    figures=lambda case, network: bits(case.run, num=case.images.count, steps=steps(case), seed=case.settings.seed),
    gives=lambda network: (Figure("bits", "bits/dim"),),
    needs=(
        Need(lambda case: case.run is not None, "a diffusion run, and no --samples"),
        Need(
            lambda case: case.run.model.stage is None,
            "a model of pixels: this run diffuses in latents, whose density is not that of images",
        ),
    ),
    least=2,
    reads=("steps", "seed"),
    origin=lambda case: {"bits_steps": steps(case)},
)
