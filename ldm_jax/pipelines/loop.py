"""The sampling loop of every pipeline: one compiled program for any prompt, seed, scale and, up to a bound, number of steps.

The network sees [x_t, channels] where a picture is told by further channels (a mask and what is around it, a depth, an image to
edit); `channels` is an entry of cond like any other. One set of conditions is sampled as it is, two are guided (cfg), three are
guided by text and picture (dual; InstructPix2Pix).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from ldm_jax.diffusion import editing, grids
from ldm_jax.diffusion.denoiser import make_branches, make_denoiser
from ldm_jax.diffusion.guidance import cfg, check_rescale, check_scale, dual
from ldm_jax.diffusion.prediction import Clean, target, to_clean
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers import sample
from ldm_jax.kernels import heap
from ldm_jax.pipelines.components import Parts, on_device
from ldm_jax.pipelines.schedule import Schedule

Cond = Mapping[str, Array]
# Grids are padded to this many steps, or to twice, four times, ...: what a compiled program is bound to.
BOUND = 32


class Held(NamedTuple):
    """What an image keeps while the rest is drawn: clean latents z, keep in [0, 1] [B, h, w, 1], the noise eps of its path."""

    z: Array
    keep: Array
    eps: Array


class Scales(NamedTuple):
    """guidance of the text; of the picture, where there are three branches; how far the result's spread is pulled back."""

    guidance: Array | float = 1.0
    image: Array | float = 1.0
    rescale: Array | float = 0.0


UNGUIDED = Scales()

# The bar of the loop that is running: a compiled program cannot be handed a new one.
_bars: list[tqdm] = []


def _tick(_: Any) -> None:
    if _bars:
        _bars[-1].update()


def _guided(branches: int, kind: str, process: Process, scales: tuple, known: tuple[Clean, ...], x_t: Array, t: Array):
    """Clean guided by two or three branches; with a third scale the spread of a row is pulled back to the first branch's.

    Lin et al. 2023 (arXiv:2305.08891), equations 14-16, of whatever the network predicts, as the published pipelines have it
    (guidance.cfg does so for v, as the paper).
    """
    if branches == 2:
        clean = cfg(lambda x_t, t: known, scales[0])(x_t, t)
    else:
        clean = dual(lambda x_t, t: known, *scales[:2])(x_t, t)
    if len(scales) == 2:
        return clean
    output, own = (target(kind, process, c.x, c.eps, t) for c in (clean, known[0]))
    spread, wanted = (jnp.std(o, tuple(range(1, o.ndim)), keepdims=True) for o in (output, own))
    output = output * (1 - scales[2] + scales[2] * wanted / spread)
    return to_clean(kind, process, output, x_t, t)


@functools.lru_cache(maxsize=32)
def _program(
    network: nn.Module, schedule: Schedule, branches: int, rescaled: bool, held: bool, ticking: bool
) -> Callable[..., Array]:
    method, process = schedule.method(), schedule.process

    def apply(params: Any, x: Array, t: Array, cond: Cond) -> Array:
        cond = dict(cond)
        channels = cond.pop("channels", None)
        told = x if channels is None else jnp.concatenate([x, channels], -1)
        output = network.apply({"params": params}, told, t, cond)
        # A learned variance that the schedule has no use for: DiT drawn from with DDIM.
        return output if schedule.learned_variance else output[..., : x.shape[-1]]

    @jax.jit
    def program(params, x, times, keys, conds, scales, known):
        made = (apply, params, process, schedule.prediction)
        learned = {"learned_variance": schedule.learned_variance}
        if branches == 1:
            denoise = make_denoiser(*made, conds[0], **learned)
        else:
            together = make_branches(*made, *conds, **learned)
            guide = functools.partial(
                _guided, branches, schedule.prediction, process, scales if rescaled else scales[:2]
            )

            def denoise(x_t: Array, t: Array) -> Clean:
                return guide(together(x_t, t), x_t, t)

        denoise = schedule.clipped(denoise)

        def counted(x_t: Array, t: Array):
            jax.debug.callback(_tick, t)
            return denoise(x_t, t)

        # The state to begin with is the caller's: published inpainting begins with noise alone.
        step = editing.preserve(method, *known)._replace(init=method.init) if held else method
        z = sample(step, counted if ticking else denoise, process, x, times, keys)
        return known.keep * known.z + (1 - known.keep) * z if held else z

    return heap.settled(program)


def run(
    parts: Parts,
    schedule: Schedule,
    x: Array,
    times: np.ndarray | Array,
    conds: Sequence[Cond],
    keys: Array,
    *,
    scales: Scales = UNGUIDED,
    held: Held | None = None,
    batch_size: int = 8,
    quiet: bool = True,
) -> Array:
    """Carry x [N, ...] at times[0] to times[-1] f[n + 1]; conds: one, two or three dicts of arrays with leading axis N.

    schedule and times are those of schedule.Schedule.at. keys [N] are for stochastic samplers. batch_size rows at a time; on
    several devices it is a multiple of their number, rows split among them and parameters replicated. It changes no row.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    check_scale("guidance", scales.guidance)
    check_scale("image_guidance", scales.image)
    check_rescale("rescale", scales.rescale)
    rows, n, devices = x.shape[0], len(times) - 1, jax.device_count()
    bound = BOUND
    while bound < n:
        bound *= 2
    times = grids.pad(jnp.asarray(times, jnp.float32), bound)
    size = -(-min(batch_size, rows) // devices) * devices
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rescaled = len(conds) > 1 and not (isinstance(scales.rescale, float) and scales.rescale == 0)
    program = _program(parts.denoiser.module, schedule, len(conds), rescaled, held is not None, not quiet)
    scales = Scales(*(jnp.asarray(s, jnp.float32) for s in scales))
    done = []
    calls = int(n * schedule.method().evaluations) * -(-rows // size)
    with on_device(parts, parts.denoiser) as params, tqdm(total=calls, disable=quiet, leave=False, unit="call") as bar:
        params = jax.device_put(params, NamedSharding(mesh, P())) if devices > 1 else params
        _bars.append(bar)
        try:
            for start in range(0, rows, size):
                # Rows past the end repeat the last one and are cut off again: one shape, one compilation.
                take = np.minimum(np.arange(start, start + size), rows - 1)
                now = jax.tree.map(lambda row, take=take: row[take], (x, keys, tuple(conds), held))
                now = jax.device_put(now, NamedSharding(mesh, P("data"))) if devices > 1 else now
                done.append(program(params, now[0], times, now[1], now[2], scales, now[3])[: rows - start])
                jax.block_until_ready(done[-1])
            jax.effects_barrier()
        finally:
            _bars.pop()
    return jnp.concatenate(done)
