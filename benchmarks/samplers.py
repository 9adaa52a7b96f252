"""What a sampling step costs beyond the network: every sampler as one lax.scan, beside diffusers' Python loop.

    python benchmarks/samplers.py [--runs 5] [--steps 20] [--only euler,heun,...]

Both sides sample [1, 64, 64, 4] latents in `steps` steps with one tiny elementwise network, eps = tanh(x / 2) + x / 4. A step's cost
beyond the network is (the whole loop - the same number of evaluations alone) / steps. Sides alternate in one process, medians.
`compile` is the first call without a cache. `programs` counts the compilations for three guidance scales times three step
counts, the grid padded to the longest: it must be 1. Samplers that diffusers lacks stand without a ratio. Prints a table and
writes benchmarks/results/samplers.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import side_by_side

from ldm_jax.diffusion import grids
from ldm_jax.diffusion.denoiser import make_pair
from ldm_jax.diffusion.guidance import cfg
from ldm_jax.diffusion.process import discrete_vp
from ldm_jax.diffusion.samplers import SAMPLERS, sample

SHAPE = (1, 64, 64, 4)
TABLE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DPM_SOLVER = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
# Our name -> diffusers' scheduler and its options.
TWINS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "deis_2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "dpm_solver_2": ("DPMSolverSinglestepScheduler", DPM_SOLVER | {"solver_order": 2}),
    "dpm_solver_3": ("DPMSolverSinglestepScheduler", DPM_SOLVER | {"solver_order": 3}),
    "dpm_solver_2m": ("DPMSolverMultistepScheduler", DPM_SOLVER | {"solver_order": 2}),
    "dpm_solver_3m": ("DPMSolverMultistepScheduler", DPM_SOLVER | {"solver_order": 3}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "uni_pc": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}),
    "uni_pc_bh2": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh2"}),
    "ddpm": ("DDPMScheduler", {"variance_type": "fixed_large"}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "sa_solver": ("SASolverScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
PROCESS = discrete_vp("scaled_linear")


def network(params, x, t, cond):
    return params * jnp.tanh(0.5 * x) + 0.25 * x


def ours(name: str, steps: int) -> tuple[Callable[[], object], Callable[[], object], dict[str, float]]:
    """The whole loop, its evaluations alone, and what compiling took."""
    sampler = SAMPLERS[name]()
    x_T = jax.random.normal(jax.random.key(0), SHAPE)
    key, longest = jax.random.key(1), max(steps, 20)
    cond = {"scale": jnp.zeros(1)}
    compilations = []

    @jax.jit
    def run(x, times, scale):
        compilations.append(1)
        denoise = cfg(make_pair(network, 1.0, PROCESS, "eps", cond, cond), scale)
        return sample(sampler, denoise, PROCESS, x, times, key if sampler.stochastic else None)

    @jax.jit
    def evaluate(x, times, scale):
        denoise = cfg(make_pair(network, 1.0, PROCESS, "eps", cond, cond), scale)
        return jax.lax.scan(lambda x, t: (denoise(x, t).x, None), x, times)[0]

    def padded(n):
        return grids.pad(grids.karras(PROCESS, n), longest)

    begin = time.perf_counter()
    jax.block_until_ready(run(x_T, padded(steps), 2.0))
    compiled = time.perf_counter() - begin
    for n in (5, 10, 20):
        for scale in (1.0, 3.0, 7.5):
            run(x_T, padded(n), scale)
    whole = padded(steps)
    # The steps of padding are in the loop and evaluate nothing.
    times = jnp.repeat(grids.karras(PROCESS, steps)[:-1], round(sampler.evaluations))
    return (
        lambda: jax.block_until_ready(run(x_T, whole, 2.0)),
        lambda: jax.block_until_ready(evaluate(x_T, times, 2.0)),
        {"compile_s": compiled, "programs": len(compilations)},
    )


def theirs(name: str, steps: int) -> tuple[Callable[[], object], Callable[[], object]]:
    import diffusers
    import torch

    kind, options = TWINS[name]
    scheduler = getattr(diffusers, kind)(**TABLE, **options)
    scheduler.set_timesteps(steps)
    calls = len(scheduler.timesteps)
    x_T = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))

    def network(x):  # both branches as one batch, and classifier-free guidance, as on our side
        cond, uncond = (torch.tanh(0.5 * torch.cat([x, x])) + 0.25 * torch.cat([x, x])).chunk(2)
        return uncond + 2.0 * (cond - uncond)

    @torch.no_grad()
    def run():
        scheduler.set_timesteps(steps)
        x = x_T * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x).prev_sample
        return x

    @torch.no_grad()
    def evaluate():
        x = x_T
        for _ in range(calls):
            x = network(x)
        return x

    return run, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="alternating runs of each side (5)")
    parser.add_argument("--steps", type=int, default=20, help="steps of the loop (20)")
    parser.add_argument("--only", default=",".join(SAMPLERS), help="names of samplers, default: all")
    o = parser.parse_args()
    unknown = sorted(set(o.only.split(",")) - set(SAMPLERS))
    if unknown:
        sys.exit(f"error: --only={','.join(unknown)}; `ldm samplers` lists them")
    rows = {}
    print(
        "| sampler | ours, us a step | diffusers, us a step | ratio | compile, s | programs |\n|---|---|---|---|---|---|"
    )
    for name in o.only.split(","):
        run, evaluate, facts = ours(name, o.steps)
        sides = {"ours": run, "ours_alone": evaluate}
        if name in TWINS:
            sides["theirs"], sides["theirs_alone"] = theirs(name, o.steps)
        wall = {side: v["median"] for side, v in side_by_side.alternate(sides, o.runs)["wall_s"].items()}
        row = {"ours_us": 1e6 * (wall["ours"] - wall["ours_alone"]) / o.steps, **facts}
        if name in TWINS:
            row["theirs_us"] = 1e6 * (wall["theirs"] - wall["theirs_alone"]) / o.steps
        rows[name] = row
        beside = f"{row['theirs_us']:.0f} | {row['ours_us'] / row['theirs_us']:.2f}" if name in TWINS else " | "
        print(f"| {name} | {row['ours_us']:.0f} | {beside} | {row['compile_s']:.2f} | {row['programs']} |", flush=True)
    path = side_by_side.RESULTS / "samplers.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows = {name: {k: float(f"{v:.4g}") for k, v in row.items()} for name, row in (before | rows).items()}
    path.write_text(json.dumps({"machine": side_by_side.machine(), "steps": o.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
