"""Draw images from a trained run.

  ldm sample --workdir=runs/quickstart --num=8 --out=out --text="a small red circle above a large blue square"
  ldm sample --workdir=runs/cifar10 --num=100 --out=out --label=cat,dog --sampler=dpmpp_2m --steps=20 --guidance=2

Writes NNNNNN.png (one an image), samples.npz (arr_0 u8[N,H,W,3], and `labels` where there are classes) and grid.png. Labels and
prompts are repeated in order; without any, every class in turn, or captions of the tuning split. Image i depends on the checkpoint,
the settings, the seed and i alone. What is not given is taken from the run's config.
"""

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from ldm_jax.training import sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run")
    parser.add_argument("--num", required=True, type=int, metavar="N", help="how many images")
    parser.add_argument("--out", required=True, metavar="DIR", help="where they go; made if it is missing")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint; default: the newest")
    parser.add_argument("--label", default="", metavar="A,B,...", help="class numbers or names")
    parser.add_argument(
        "--text", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times"
    )
    parser.add_argument("--batch-size", type=int, metavar="B", help="images at a time; changes no image")
    parser.add_argument("--columns", type=int, metavar="C", help="images a row of grid.png (default: as many as rows)")
    add_sampling_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What `ldm sample` and `ldm evaluate` share: which parameters, and how to draw."""
    parser.add_argument("--ema", metavar="K", help="which average: its half-life in images; 'none': the raw parameters")
    parser.add_argument("--sampler", metavar="NAME", help="update rule; `ldm samplers` lists them")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the sampler")
    parser.add_argument("--grid", metavar="NAME", help="spacing of the times; listed there as well")
    parser.add_argument("--guidance", type=float, metavar="W", help="scale of classifier-free guidance; 1: none")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def settings_from(config: "ConfigDict", args: argparse.Namespace) -> "sampling.Settings":
    """The run's own sampling settings with those of the command line over them."""
    from ldm_jax.training import experiment, sampling

    given = {"name": args.sampler, "steps": args.steps, "grid": args.grid, "guidance": args.guidance}
    settings = experiment.sampling_settings(config)
    if args.sampler not in (None, settings.name):
        given["options"] = {}  # those of the run are another sampler's
    if args.grid not in (None, settings.grid):
        given["grid_options"] = {}
    settings = settings._replace(**{k: v for k, v in given.items() if v is not None})
    sampling.check(settings)
    return settings


def run(args: argparse.Namespace, rest: list[str]) -> int:
    import numpy as np
    from PIL import Image

    from ldm_jax.data import grid
    from ldm_jax.evaluation import generate
    from ldm_jax.training import checkpoint, experiment

    if args.num < 1:
        raise ValueError(f"--num={args.num}; expected at least 1")
    if args.columns is not None and args.columns < 1:
        raise ValueError(f"--columns={args.columns}; expected at least 1")
    config = experiment.read_config(pathlib.Path(args.workdir))
    if config.task.name != "diffusion":
        raise ValueError(f"{args.workdir} holds a run of the task {config.task.name!r}; only 'diffusion' draws images")
    settings = settings_from(config, args)
    model = experiment.restore(args.workdir, args.step, args.ema)
    labels = [word for word in args.label.split(",") if word]
    what = generate.told(model, args.num, labels, args.text)
    made_by = {
        "workdir": str(pathlib.Path(args.workdir).absolute()),
        "step": model.step,
        "checkpoint": model.sha256,
        "ema": args.ema or experiment.default_average(config) or "none",
        "seed": args.seed,
        **{"sampler" if k == "name" else k: v for k, v in settings._asdict().items()},
        "labels": labels,
        "prompts": args.text,
    }
    out = pathlib.Path(args.out)
    record = out / "settings.json"
    if record.exists() and json.loads(record.read_text()) != made_by:
        raise ValueError(f"--out={out} holds images drawn with other settings ({record}); take another folder")
    if (out / "samples.npz").exists() and not record.exists():
        raise ValueError(f"--out={out} holds images of another origin; take another folder")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(record, json.dumps(made_by, indent=1) + "\n")
    images = np.concatenate(
        list(
            generate.draw(
                model,
                settings,
                what,
                count=args.num,
                seed=args.seed,
                tokenizer=experiment.tokenizer(config),
                batch_size=args.batch_size or config.sampler.batch_size,
                quiet=args.quiet,
            )
        )
    )
    for i, image in enumerate(images):
        Image.fromarray(image).save(out / f"{i:06d}.png")
    arrays = {"arr_0": images}
    if what.labels is not None:
        arrays["labels"] = what.labels
    partial = out / "samples.partial.npz"
    np.savez(partial, **arrays)
    partial.replace(out / "samples.npz")
    shown = min(len(images), 100)
    captions = what.prompts[:shown] if what.prompts else None
    grid.save(out / "grid.png", images[:shown], args.columns, labels=captions)
    print(f"{len(images)} images in {out} (grid.png, samples.npz)")
    return 0
