"""The metric bits: bits a dimension of real images under a diffusion model in pixels.

It is the exact likelihood of uniformly dequantised images by the probability-flow ODE, the divergence by one Rademacher probe an image
(Song et al. 2021, arXiv:2011.13456, equations 39 and 40, appendix D.2; Theis et al. 2016, arXiv:1511.01844, section 3.1), which
bounds the length of a lossless code by this model. A conditional model is conditioned on the class and the caption of each image;
nothing is guided. The density is that of the process at the time `bits_start`, where a little noise is left.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.data.subset import spread
from ldm_jax.diffusion import likelihood
from ldm_jax.diffusion.grids import kl_optimal
from ldm_jax.diffusion.process import Process, inverse_log_snr
from ldm_jax.evaluation import images
from ldm_jax.evaluation.metrics import PIXELS, Case, Figure, Metric, Need
from ldm_jax.kernels import heap, mesh
from ldm_jax.sampling import draw
from ldm_jax.sampling import model as core
from ldm_jax.sampling.backwards import UNGUIDED, estimate
from ldm_jax.sampling.settings import Guidance
from ldm_jax.training import conditioning, restore, sampling, streams

# sigma / alpha where the path begins, if the process does not begin with more: an eighth of a level of uint8.
LEAST_NOISE = 1e-3


def one_batch(model: core.Model, condition: Callable[[Any, Any, Array], core.Cond]) -> Callable[..., Array]:
    """(params, batch {'image': u8[B, H, W, 3], ...}, keys [B], times) -> bits a dimension f[B], to be compiled.

    condition(params, batch, keys) -> cond of the network. Each image draws its dequantisation and its probe from its key alone.
    """
    model = model._replace(transforms=())

    def batch_bits(params: Any, batch: Any, keys: Array, times: Array) -> Array:
        denoise = estimate(model, Guidance(), params, [condition(params, batch, keys)], UNGUIDED)
        noise, probes = (jax.vmap(lambda key, k=k: jax.random.fold_in(key, k))(keys) for k in (0, 1))
        x = likelihood.dequantise(noise, batch["image"])
        log_p = likelihood.log_likelihood(denoise, model.process, x, times, probes, divergence=likelihood.hutchinson())
        return likelihood.bits_per_dim(log_p, x[0].size, bin_width=2 / 256)

    return batch_bits


def path(process: Process, steps: int) -> Array:
    """f32[steps + 1]: the times of the path from data to noise, equal in the angle atan(sigma / alpha)."""
    # At sigma = 0 the prediction of x does not determine eps.
    start = float(inverse_log_snr(process, jnp.float32(-2 * np.log(LEAST_NOISE))))
    return kl_optimal(process, steps, end=max(start, process.t_min))[::-1]


@functools.lru_cache(maxsize=8)
def _program(model: core.Model) -> Callable[..., Array]:
    return heap.settled(jax.jit(one_batch(model, lambda params, batch, keys: batch["cond"])))


def of_images(
    model: core.Model, params: Any, cond: core.Cond, pictures: np.ndarray, *, steps: int, seed: int, batch_size: int
) -> np.ndarray:
    """Bits a dimension f64[N] of pictures u8[N, H, W, 3] under a model of pixels in [-1, 1], with the arrays of cond [N, ...].

    Image i draws its dequantisation and its probe by `seed` and i alone; steps as in `bits`.
    """

    def rows(take: np.ndarray) -> tuple[Any, Array]:
        batch = {"image": pictures[take], "cond": jax.tree.map(lambda value: np.asarray(value)[take], cond)}
        return batch, sampling.image_keys(seed, take)

    def program(params: Any, row: tuple[Any, Array], times: Array) -> Array:
        return _program(model)(params, *row, times)

    times, count = path(model.process, steps), len(pictures)
    values = draw.batches(program, params, rows, times, count=count, batch_size=batch_size)
    return np.concatenate([np.float64(value) for value in values])


def bits(run: restore.Restored, *, num: int, steps: int, seed: int) -> dict[str, Any]:
    """{'bits': mean over `num` reporting images, 'bits_error': its standard error, and what it depends on}.

    `steps` of fourth order, equal in the angle atan(sigma / alpha): four evaluations and as many products with the Jacobian each.
    Image i draws its dequantisation and its probe by `seed` and i alone. The model is one of pixels.
    """
    model = run.model
    report = spread(streams.source(run.experiment, "report"), num)

    def condition(params: Any, batch: Any, keys: Array) -> core.Cond:
        return conditioning.complete(model.conditioning, params, params["frozen"], batch, keys)

    device_mesh = mesh.make_mesh()
    by_row, replicated = mesh.batch_sharding(device_mesh), mesh.replicated(device_mesh)
    shardings = {"in_shardings": (replicated, by_row, by_row, replicated), "out_shardings": by_row}
    compiled = heap.settled(jax.jit(one_batch(sampling.network(model), condition), **shardings))
    # The network takes its entry, the conditions theirs and what nobody trains.
    params = jax.device_put({**run.params, "frozen": run.frozen}, replicated)
    times = path(model.process, steps)
    keys_of = jax.jit(lambda rows: sampling.image_keys(seed, rows), out_shardings=by_row)
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
