"""Which sampler for how many network evaluations, on a real checkpoint: the CIFAR-10 latent DiT.

    ldm train --config=configs/cifar10_classifier.py --workdir=runs/cifar10_classifier
    ldm train --config=configs/cifar10_ldm_dit.py --workdir=runs/cifar10_ldm_dit
    python -m experiments.sampler_nfe [--num 250] [--guidance 1.0]

Two figures for each sampler and budget. `fd_classifier`: Frechet distance of `num` images to the test split, in the features
of the classifier. `error`: root mean square, over pixels in [-1, 1], of the difference to the image that the same noise
reaches on the exact path (RK4, 60 steps on a quadratic grid), for deterministic samplers. A sampler of e evaluations a step
gets the nearest number of steps to budget / e that does not exceed it; the table says the evaluations that it made. Each
sampler compiles once, its grid padded to 50 steps. Rows that stand in results.csv are not measured again. Writes results.csv,
tables.md and sampler_nfe.png to experiments/sampler_nfe.
"""

import argparse
import csv
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ldm_jax.diffusion.grids import pad
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.evaluation import features, frechet, generate, reference, statistics
from ldm_jax.kernels import heap
from ldm_jax.training import restore, sampling
from ldm_jax.training.images import to_uint8

HERE = pathlib.Path(__file__).parent / "sampler_nfe"
BUDGETS = (5, 8, 10, 15, 20, 25, 50)
NAMES = (
    "euler",
    "heun",
    "dpmpp_2m",
    "dpmpp_3m",
    "deis_3",
    "ipndm",
    "uni_pc",
    "res_multistep",
    "euler_ancestral",
    "dpmpp_2m_sde",
)
EXACT = {"name": "rk4", "grid": "quadratic"}  # whose last step, which is Euler's, is tiny
EXACT_STEPS = 60
BATCH = 125
FIELDS = ("sampler", "budget", "steps", "evaluations", "fd_classifier", "error", "num", "guidance", "seconds")


def drawer(run, settings, steps, num, seed=0):
    """draw(steps) -> images f32[num, H, W, 3], near [-1, 1]; one compiled program for every number of steps up to `steps`."""
    compiled = heap.settled(jax.jit(sampling.make_generate(run.model, settings)))
    labels = generate.asked(run, num, (), []).labels

    def draw(n):
        times = pad(sampling.make_times(run.model, settings._replace(steps=n)), steps)
        images = []
        for start in range(0, num, BATCH):
            rows = np.arange(start, min(start + BATCH, num))
            keys, batch = sampling.image_keys(seed, rows), {"label": jnp.asarray(labels[rows])}
            images.append(compiled(run.params, run.frozen, keys, batch, times, jnp.float32(settings.guidance)))
        return np.concatenate([np.asarray(x) for x in images])

    return draw


def distance(images, extractor, expected):
    moments = statistics.empty(extractor.dim)
    for start in range(0, len(images), BATCH):
        moments = statistics.update(moments, extractor.apply(np.asarray(to_uint8(images[start : start + BATCH]))))
    made = statistics.gaussian(moments)
    return frechet.distance(made.mean, made.covariance, expected.mean, expected.covariance)


def read(path):
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def plot(rows, path):
    _, axes = plt.subplots(1, 2, figsize=(12, 4.6))
    for k, name in enumerate(NAMES):
        own = [row for row in rows if row["sampler"] == name]
        style = {"color": f"C{k}", "linestyle": "--" if SAMPLERS[name]().stochastic else "-", "marker": "."}
        for axis, figure in zip(axes, ("fd_classifier", "error")):
            points = [(float(r["evaluations"]), float(r[figure])) for r in own if r[figure]]
            if points:
                axis.plot(*zip(*points), label=name, **style)
    for axis, title in zip(axes, ("fd_classifier (lower is better)", "RMS distance to the exact path's image")):
        axis.set(xscale="log", yscale="log", xlabel="network evaluations", title=title)
        axis.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, ncol=2)
    plt.tight_layout()
    plt.savefig(path, dpi=110)


def table(rows, figure):
    lines = ["| sampler | " + " | ".join(map(str, BUDGETS)) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
    for name in NAMES:
        own = {int(row["budget"]): row for row in rows if row["sampler"] == name}
        cells = [f"{float(own[b][figure]):.3g}" if b in own and own[b][figure] else "" for b in BUDGETS]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.sampler_nfe", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/cifar10_ldm_dit", metavar="DIR", help="the trained run")
    parser.add_argument("--classifier", default="runs/cifar10_classifier", metavar="DIR", help="the judge")
    parser.add_argument("--num", type=int, default=250, metavar="N", help="images a row (250)")
    parser.add_argument("--guidance", type=float, default=1.0, metavar="W", help="scale; 1 (the default): none")
    parser.add_argument("--out", type=pathlib.Path, default=HERE, metavar="DIR", help="(experiments/sampler_nfe)")
    o = parser.parse_args()
    heap.keep()
    o.out.mkdir(parents=True, exist_ok=True)
    try:
        run = restore.restore(pathlib.Path(o.workdir), None, None)
        extractor = features.classifier(o.classifier)
    except (ValueError, OSError) as error:
        print(f"sampler_nfe: {error}", file=sys.stderr)
        return 2
    take, cache = ("moments", extractor.name, "features"), pathlib.Path(o.workdir) / "statistics"
    split, networks = f"split:{run.experiment.split.report}", {extractor.name: extractor}
    real = reference.open_reference(split, run.experiment, [take], networks, cap=1, folder=cache)
    expected = real.moments[extractor.name, "features"]
    base = sampling.Settings(grid="uniform", guidance=o.guidance)

    rows = [row for row in read(o.out / "results.csv") if row["num"] == str(o.num)]
    done = {(row["sampler"], int(row["budget"])) for row in rows if float(row["guidance"]) == o.guidance}
    if len(done) < len(NAMES) * len(BUDGETS):
        exact = drawer(run, base._replace(**EXACT), EXACT_STEPS, o.num)(EXACT_STEPS)
        print(f"exact path: fd_classifier {distance(exact, extractor, expected):.3f}", flush=True)
    for name in NAMES:
        if all((name, budget) in done for budget in BUDGETS):
            continue
        sampler = SAMPLERS[name]()
        draw = drawer(run, base._replace(name=name), max(BUDGETS), o.num)
        for budget in BUDGETS:
            if (name, budget) in done:
                continue
            # Heun's last step, into clean data, takes one evaluation: n steps are 2 n - 1.
            saved = 1 if name == "heun" else 0
            steps = int((budget + saved) // sampler.evaluations)
            begin = time.perf_counter()
            images = draw(steps)
            row = dict.fromkeys(FIELDS, "") | {
                "sampler": name,
                "budget": budget,
                "steps": steps,
                "evaluations": int(sampler.evaluations * steps - saved),
                "fd_classifier": f"{distance(images, extractor, expected):.4f}",
                "error": "" if sampler.stochastic else f"{np.sqrt(np.mean((images - exact) ** 2)):.5f}",
                "num": o.num,
                "guidance": o.guidance,
                "seconds": f"{time.perf_counter() - begin:.1f}",
            }
            rows.append({k: str(v) for k, v in row.items()})
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            with (o.out / "results.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows)
    plot(rows, o.out / "sampler_nfe.png")
    (o.out / "tables.md").write_text(
        f"fd_classifier, {o.num} images, guidance {o.guidance:g}, by budget of network evaluations:\n\n"
        f"{table(rows, 'fd_classifier')}\n\nRMS distance to the exact path's image:\n\n{table(rows, 'error')}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
