"""Items in batches of one shape: padding, placement on devices, progress, and the store of compiled programs.

A compiled program is bound to a Plan: the model, the sampler, the kind of guidance. Prompts, seeds, scales, times and, up to a bound,
the number of steps are its arguments, so that none of them costs a compilation.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from ldm_jax.diffusion import grids
from ldm_jax.diffusion.samplers import Sampler
from ldm_jax.kernels import heap, mesh
from ldm_jax.sampling.backwards import UNGUIDED, Held, Scales, backwards, check_scales
from ldm_jax.sampling.model import Cond, Model
from ldm_jax.sampling.settings import Guidance

# Grids are padded to this many steps, or to twice, four times, ... as many: a compiled program is bound to the padded length.
BOUND = 32

# The bar of the loop that is running: a compiled program cannot be handed a new one.
_bars: list[tqdm] = []


def _tick(_: Any) -> None:
    if _bars:
        _bars[-1].update()


@contextlib.contextmanager
def ticking(calls: int, quiet: bool) -> Iterator[None]:
    """A bar of so many calls of the denoiser, which `_tick` moves for as long as the block lasts."""
    with tqdm(total=calls, disable=quiet, leave=False, unit="call") as bar:
        _bars.append(bar)
        try:
            yield
            jax.effects_barrier()
        finally:
            _bars.pop()


class Plan(NamedTuple):
    """All that a compiled program is bound to; equal plans share one program.

    sampler  a hashable callable that makes the Sampler: settings.Rule
    held     whether a region is held
    last     whether the estimate is taken once more at the end of the grid, where noise is left
    ticks    whether each estimate moves the bar
    """

    model: Model
    sampler: Callable[[], Sampler]
    guidance: Guidance = Guidance()
    held: bool = False
    last: bool = False
    ticks: bool = False


@functools.lru_cache(maxsize=32)
def program(plan: Plan) -> Callable[..., Array]:
    """(params, rows (x, keys, conds, held), times, scales) -> x at times[-1]; compiled once for each shape of its arguments."""
    sampler, tick = plan.sampler(), _tick if plan.ticks else None

    @jax.jit
    def compiled(params, rows, times, scales):
        x, keys, conds, held = rows
        return backwards(
            plan.model, plan.guidance, sampler, params, x, times, keys, conds, scales, held, last=plan.last, tick=tick
        )

    return heap.settled(compiled)


def padded(times: np.ndarray | Array) -> Array:
    """f32[bound + 1]: times f[n + 1] with its last entry repeated, steps that do nothing; bound is BOUND times a power of 2."""
    bound = BOUND
    while bound < len(times) - 1:
        bound *= 2
    return grids.pad(jnp.asarray(times, jnp.float32), bound)


def batches(
    compiled: Callable[..., Any],
    params: Any,
    rows: Callable[[np.ndarray], Any],
    *shared: Any,
    count: int,
    batch_size: int,
) -> Iterator[Any]:
    """The outputs of compiled(params, rows(i), *shared) for i = 0 .. count - 1, batch by batch in order, as numpy arrays [b, ...].

    rows(i[B]) -> a tree of arrays with leading axis B. Every batch has one shape: rows past the end repeat the last one and are cut
    off again. On several devices the batch is a multiple of their number; rows are split among them, parameters are on each.
    """
    device_mesh = mesh.make_mesh()
    shards = device_mesh.devices.size
    by_row = mesh.batch_sharding(device_mesh)
    size = -(-min(batch_size, count) // shards) * shards
    params = jax.device_put(params, mesh.replicated(device_mesh)) if shards > 1 else jax.device_put(params)

    def placed(value: Any) -> Array:
        if shards == 1:
            return value
        # An array of numpy is the whole batch in every process; an array of jax is there already, or belongs to this process alone.
        return mesh.shard_global({"": value}, device_mesh)[""] if isinstance(value, np.ndarray) else put(value)

    def put(value: Array) -> Array:
        return value if value.sharding == by_row else jax.device_put(value, by_row)

    for start in range(0, count, size):
        batch = jax.tree.map(placed, rows(np.minimum(np.arange(start, start + size), count - 1)))
        out = mesh.to_host(compiled(params, batch, *shared))
        yield jax.tree.map(lambda value, start=start: value[: count - start], out)


def draw(
    plan: Plan,
    params: Any,
    x: Array,
    times: np.ndarray | Array,
    keys: Array,
    conds: Sequence[Cond],
    *,
    scales: Scales = UNGUIDED,
    held: Held | None = None,
    batch_size: int = 8,
    quiet: bool = True,
) -> np.ndarray:
    """x f32[N, ...] at times[0] carried to times[-1], f[n + 1]; batch_size rows at a time, which changes no row.

    conds: one, two or three dicts of arrays with leading axis N, see backwards; keys [N] are for samplers that draw noise. Raises
    ValueError for a batch size below 1 and for scales out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    check_scales(scales)
    unscaled = isinstance(scales.rescale, float) and scales.rescale == 0
    how = plan.guidance
    if len(conds) == 1 or (how.rescale is None and unscaled):
        how = how._replace(rescale=0.0)
    plan = plan._replace(guidance=how, held=held is not None, ticks=not quiet)
    compiled, count = program(plan), x.shape[0]
    arrays = (x, keys, tuple(conds), held)
    scales = Scales(*(jnp.asarray(s, jnp.float32) for s in scales))
    size = -(-min(batch_size, count) // jax.device_count()) * jax.device_count()
    calls = int((len(times) - 1) * plan.sampler().evaluations) * -(-count // size)
    with ticking(calls, quiet):
        return np.concatenate(
            [
                *batches(
                    compiled,
                    params,
                    lambda take: jax.tree.map(lambda value: value[take], arrays),
                    padded(times),
                    scales,
                    count=count,
                    batch_size=batch_size,
                )
            ]
        )
