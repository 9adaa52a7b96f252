"""Orders of convergence of every deterministic sampler, measured against exact solutions.

    python -m experiments.sampler_orders

Every sampler is run on a Gaussian and on a mixture of Gaussians (ldm_jax/diffusion/exact.py), whose probability-flow ODE is solved
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
from ldm_jax.diffusion.exact import GAUSSIAN, MIXTURE
from ldm_jax.diffusion.prediction import Clean
from ldm_jax.diffusion.process import Process, inverse_log_snr, log_snr, prior_std
from ldm_jax.diffusion.samplers import SAMPLERS, Sampler, sample

PROBLEMS = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
PROCESSES = ("vp_linear", "ve", "flow", "edm")
COUNTS = (4, 8, 16, 32, 64, 128, 256, 512)
FITTED = COUNTS[-2:]
ROWS = 8
FOLDER = pathlib.Path(__file__).with_suffix("")

HEAD = """# Orders of convergence of the deterministic samplers

`python -m experiments.sampler_orders` makes this page, [orders.csv](orders.csv) and the plot; `tests/diffusion/test_samplers.py`
holds every figure to within 0.15 of the order stated.

Root mean square error of the final x, in double precision, on a Gaussian and on a mixture of four Gaussians in two dimensions,
against their exact probability-flow solutions, from the noisiest time of each process (flow: t = 0.99, for log-SNR must be finite)
to sigma / alpha = 0.1. The measured order is log2(error at 256 steps / error at 512).

"""
TAIL = """
- Steps are equal in log-SNR, but for the multistep methods of order above 2 (`lms`, `deis_3`, `uni_pc`, `uni_pc_bh2`): their
  first steps are of order 1, 2, ..., and to see what comes after, the lengths grow like 1, 3, 5, ... On equal steps the first
  one leaves a term n^-2, which is small, for x and eps hardly depend on log-SNR where sigma / alpha = 50 to 150, but which
  rules in the end: on the Gaussian `lms` and `deis_3` then fall to between 2 and 3 below errors of 1e-7.
- `midpoint` is of order 2; on Gaussian data the leading term of its error is zero and 3 is measured (see its docstring).
- `dpmpp_3m` and `dpm_solver_3m` are of order 2: the published code halves the weight of the second divided difference.
  `res_multistep(order=3)` and `deis_3` have the whole weight.
- `ipndm`, `plms` and `pndm` weigh past slopes as if steps were equal in tau = sigma / alpha (flow: t), and are of order 2
  where they are not.
- `uni_pc` of order p is of order p + 1: the corrector gains one.
- `dpm_adaptive` at its default tolerance takes more evaluations than `dpm_solver_3` on coarse grids only, to keep its tolerance.

![error against network evaluations](orders.png)
"""


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
    noise, measured, calls = np.random.default_rng(0).standard_normal((ROWS, 2)), {}, []
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
                        measured.setdefault((name, problem), []).append(Measured(error, len(calls)))
    return measured


def order(errors: Sequence[float], counts: Sequence[int] = FITTED) -> float:
    """The p of error ~ n^-p by least squares."""
    return float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])


def table(measured: dict[str, dict]) -> str:
    """Markdown: a row a sampler; its order as stated, its evaluations in 512 steps, its measured order in each setting."""
    settings = [(process, problem) for process in PROCESSES for problem in PROBLEMS]
    lines = [
        "| sampler | order | evaluations in 512 steps | " + " | ".join(f"{a}, {b}" for a, b in settings) + " |",
        "|---|---|---|" + "---|" * len(settings),
    ]
    for name, points in measured.items():
        orders = (order([m.error for m in points[key]][-2:]) for key in settings)
        evaluations = points[settings[0]][-1].evaluations
        lines.append(
            f"| `{name}` | {SAMPLERS[name]().order:g} | {evaluations} | "
            + " | ".join(f"{p:.2f}" for p in orders)
            + " |"
        )
    return "\n".join(lines)


def plot(measured: dict[str, dict], file: pathlib.Path) -> None:
    """Error against evaluations, log-log: a panel a process and problem, a colour an order, a label at each line's end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(PROBLEMS), len(PROCESSES), figsize=(22, 13), sharex=True, sharey=True)
    styles = ["-", "--", ":", "-."]
    for row, problem in zip(axes, PROBLEMS):
        for axis, process in zip(row, PROCESSES):
            for i, (name, points) in enumerate(measured.items()):
                evaluations, errors = (
                    [getattr(m, f) for m in points[process, problem]] for f in ("evaluations", "error")
                )
                axis.loglog(
                    evaluations,
                    errors,
                    styles[i // 10],
                    color=f"C{i % 10}",
                    label=f"{name} ({SAMPLERS[name]().order:g})",
                )
            axis.set_title(f"{process}, {problem}")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("root mean square error of x")
    for axis in axes[-1]:
        axis.set_xlabel("network evaluations")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", title="sampler (order)")
    figure.tight_layout(rect=(0, 0, 0.88, 1))
    figure.savefig(file, dpi=75)
    plt.close(figure)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    measured = {}
    for name, sampler in deterministic().items():
        measured[name] = measure(sampler, counts=COUNTS, count_evaluations=True)
        print(name, *(f"{order([m.error for m in points][-2:]):.2f}" for points in measured[name].values()), flush=True)
    with open(FOLDER / "orders.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sampler", "process", "problem", "steps", "evaluations", "error"])
        for name, settings in measured.items():
            for (process, problem), points in settings.items():
                for n, m in zip(COUNTS, points):
                    rows.writerow([name, process, problem, n, m.evaluations, f"{m.error:.4e}"])
    plot(measured, FOLDER / "orders.png")
    (FOLDER / "README.md").write_text(HEAD + table(measured) + "\n" + TAIL)


if __name__ == "__main__":
    main()
