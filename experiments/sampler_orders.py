"""Orders of convergence of every deterministic sampler, measured against exact solutions.

    python -m experiments.sampler_orders

Every sampler is run on a Gaussian and on a mixture of Gaussians (tests/helpers.py), whose probability-flow ODE is solved
in closed form, from each process's noisiest time to sigma / alpha = 0.1, in double precision. The order is the slope of
log error against log steps at 256 and 512 of them. Writes README.md, orders.csv and orders.png to sampler_orders/.
"""

import csv
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import process as P
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import Process, inverse_log_snr, log_snr, prior_std
from ldm_jax.diffusion.samplers import SAMPLERS, Sampler, sample
from tests.helpers import GAUSSIAN, MIXTURE

PROBLEMS = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
PROCESSES = ("vp_linear", "ve", "flow", "edm")
FITTED = (256, 512)
ROWS = 8
FOLDER = pathlib.Path(__file__).with_suffix("")


class Measured(NamedTuple):
    """Root mean square error of x at the end, and how often the denoiser was asked (0 where that was not counted)."""

    error: float
    evaluations: int


def deterministic() -> dict[str, Sampler]:
    """Every sampler that draws no noise, ddim without its eta excepted: that is euler."""
    samplers = {name: make() for name, make in SAMPLERS.items() if name != "ddim"}
    return {name: sampler for name, sampler in samplers.items() if not sampler.stochastic}


def ends(process: Process) -> tuple[float, float]:
    """Where runs begin and end: t_max, but 0.99 where alpha(1) = 0, for lambda must be finite; sigma / alpha = 0.1."""
    start = 0.99 if float(process.alpha(jnp.float64(1))) == 0 else process.t_max
    return start, float(inverse_log_snr(process, jnp.float64(-2 * np.log(0.1))))


def even(process: Process, n: int, power: float = 1.0) -> np.ndarray:
    """n steps of equal length in lambda = log(alpha / sigma), or with lambda_i - lambda_0 ~ (i / n)^power."""
    first, last = (float(log_snr(process, jnp.float64(t))) for t in ends(process))
    times = np.array(inverse_log_snr(process, jnp.asarray(first + (last - first) * (np.arange(n + 1) / n) ** power)))
    times[[0, -1]] = ends(process)
    return times


def graded(process: Process, n: int) -> np.ndarray:
    """n steps in lambda whose lengths grow like 1, 3, 5, ...: what a multistep method of order 3 or 4 is measured on.

    Its first steps are of order 1, 2, ...; in `even` the very first leaves an error ~ n^-2, small where the grid begins at
    sigma / alpha >> 1 but in the end the largest. Here it leaves n^-4.
    """
    return even(process, n, 2.0)


def grid_of(sampler: Sampler) -> Callable[[Process, int], np.ndarray]:
    """graded for multistep methods (one evaluation a step) of order above 2, even for all others."""
    return graded if sampler.evaluations == 1 and sampler.order > 2 else even


def one_of(processes: Sequence[Process], i: jax.Array) -> Process:
    """The i-th process, i traced, of several with one k = affine: one compiled program serves them all."""

    def choose(schedules: list[Callable]) -> Callable:
        return lambda t: jax.lax.switch(i, schedules, t)

    return processes[0]._replace(
        alpha=choose([process.alpha for process in processes]),
        sigma=choose([process.sigma for process in processes]),
        t_of_log_snr=choose([lambda value, process=process: inverse_log_snr(process, value) for process in processes]),
    )


def measure(
    sampler: Sampler,
    names: Sequence[str] = PROCESSES,
    counts: Sequence[int] = FITTED,
    grid: Callable[[Process, int], np.ndarray] | None = None,
    count_evaluations: bool = False,
) -> dict[tuple[str, str], list[Measured]]:
    """(process, problem) -> what `sampler` does with each number of steps in counts."""
    noise, found, calls = np.random.default_rng(0).standard_normal((ROWS, 2)), {}, []
    grid = grid or grid_of(sampler)
    with jax.enable_x64(True):
        made = {name: P.PROCESSES[name]() for name in names}
        for affine in sorted({process.affine for process in made.values()}):
            group = {name: process for name, process in made.items() if process.affine == affine}

            def run(i, x, times, group=group):
                process = one_of(list(group.values()), i)

                def denoise(x_t, t):
                    if count_evaluations:
                        jax.debug.callback(lambda t: calls.append(1), t)
                    parts = zip(PROBLEMS.values(), (slice(None, ROWS), slice(ROWS, None)))
                    clean = [problem.denoiser(process)(x_t[rows], t[rows] if t.ndim else t) for problem, rows in parts]
                    return Clean(*(jnp.concatenate([getattr(c, field) for c in clean]) for field in ("x", "eps")))

                return sample(sampler, denoise, process, x, times)

            compiled = jax.jit(run)
            for i, (name, process) in enumerate(group.items()):
                start, end = ends(process)
                x_T = noise * float(prior_std(process, jnp.float64(start)))
                exact = [problem.endpoint(process, x_T, start, end) for problem in PROBLEMS.values()]
                for n in counts:
                    times = grid(process, n)
                    times = np.append(times, np.full(max(counts) - n, times[-1]))
                    calls.clear()
                    out = np.asarray(compiled(i, jnp.asarray(np.concatenate([x_T, x_T])), jnp.asarray(times)))
                    jax.effects_barrier()
                    for problem, truth, x in zip(PROBLEMS, exact, np.split(out, len(PROBLEMS))):
                        error = float(np.sqrt(np.mean((x - truth) ** 2)))
                        found.setdefault((name, problem), []).append(Measured(error, len(calls)))
    return found


def order(errors: Sequence[float], counts: Sequence[int] = FITTED) -> float:
    """The p of error ~ n^-p by least squares."""
    return float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])
