"""Draw images from a trained run.

  ldm sample --workdir=runs/quickstart --num=8 --out=out --text="a small red circle above a large blue square"
  ldm sample --workdir=runs/emoji64 --num=64 --out=out --prompts=split:test_style
  ldm sample --workdir=runs/cifar10 --num=100 --out=out --label=cat,dog --sampler=dpmpp_2m --steps=20 --guidance=2
  ldm sample --workdir=runs/cifar10 --num=100 --out=out --guidance=4 --guidance-method=apg:eta=0,threshold=10

Writes NNNNNN.png (one an image), samples.npz (ADM's: arr_0 u8[N,H,W,3], and arr_1 i64[N] where there are classes) and grid.png.
Labels and prompts are repeated in order; without any, every class in turn, or captions of the tuning split. Image i depends on the
checkpoint, the settings, the seed and i alone. What is not given is taken from the run's config.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ldm_jax.cli import checks

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from ldm_jax.training import sampling

SHOWN = 100  # images in grid.png, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run")
    parser.add_argument("--num", required=True, type=int, metavar="N", help="how many images")
    parser.add_argument("--out", required=True, metavar="DIR", help="where they go; made if it is missing")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint; default: the newest")
    parser.add_argument("--label", default="", metavar="A,B,...", help="classes, by number or name")
    parser.add_argument(
        "--text", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times"
    )
    parser.add_argument("--prompts", default="", metavar="FILE|split:NAME", help="prompts, a line each, or captions")
    parser.add_argument("--batch-size", type=int, metavar="B", help="images at a time; changes no image")
    parser.add_argument("--columns", type=int, metavar="C", help="images a row of grid.png (default: as many as rows)")
    add_sampling_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What `ldm sample` and `ldm evaluate` share: which parameters, and how to draw."""
    parser.add_argument("--ema", metavar="K", help="which average: its half-life in images; 'none': the raw parameters")
    parser.add_argument(
        "--first-stage",
        default="",
        metavar="DIR",
        help="decode with this autoencoder of the same latents: a run whose decoder alone was tuned, or a published one",
    )
    named = "NAME[:OPTION=VALUE,...]"
    parser.add_argument("--sampler", metavar=named, help="update rule; `ldm samplers` lists them")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the sampler")
    parser.add_argument("--grid", metavar=named, help="spacing of the times; listed there as well")
    parser.add_argument("--guidance", type=float, metavar="W", help="scale of classifier-free guidance; 1: none")
    parser.add_argument(
        "--guidance-method",
        metavar=named,
        help="cfg, apg, cfg_zero or cfg_pp (CFG++: a scale in 0..1, samplers like ddim); listed there as well",
    )
    parser.add_argument("--guidance-schedule", metavar=named, help="the scale over time, such as linear; listed there")
    parser.add_argument(
        "--threshold", metavar=named, help="none, static or dynamic: the estimate kept in range, for pixels"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="0 to 2**64 - 1 (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _value(text: str) -> int | float | bool | str:
    for read in (int, float, {"true": True, "false": False}.__getitem__):
        try:
            return read(text)
        except (ValueError, KeyError):
            pass
    return text


def named(flag: str, text: str) -> tuple[str, dict[str, int | float | bool | str]]:
    """'NAME:OPTION=VALUE,...' -> (NAME, {OPTION: value}). Raises ValueError naming the flag and the word without a value."""
    name, _, rest = text.partition(":")
    options = {}
    for word in rest.split(",") if rest else ():
        option, equals, value = word.partition("=")
        if not option or not equals or not value:
            raise ValueError(f"{flag}={text}: {word!r} is no option; expected NAME:OPTION=VALUE,...")
        options[option] = _value(value)
        if options[option] != options[option]:
            raise ValueError(f"{flag}={text}: {word!r} is not a number")
    return name, options


def settings_from(config: "ConfigDict", args: argparse.Namespace) -> "sampling.Settings":
    """The run's own sampling settings with those of the command line over them."""
    from ldm_jax.training import experiment, sampling

    checks.number("steps", args.steps, 1, checks.MOST_STEPS)
    checks.scale("guidance", args.guidance)
    settings = experiment.sampling_settings(config)
    given = {"steps": args.steps, "guidance": args.guidance}
    for flag, key, options_key in (
        ("sampler", "name", "options"),
        ("grid", "grid", "grid_options"),
        ("guidance_method", "guidance_method", "guidance_options"),
        ("guidance_schedule", "guidance_schedule", "schedule_options"),
        ("threshold", "threshold", "threshold_options"),
    ):
        text = getattr(args, flag)
        if text is not None:
            given[key], options = named("--" + flag.replace("_", "-"), text)
            # The run's own options stay with the name that they belong to.
            if options or given[key] != getattr(settings, key):
                given[options_key] = options
    settings = settings._replace(**{k: v for k, v in given.items() if v is not None})
    sampling.check(settings)
    return settings


def run(args: argparse.Namespace, rest: list[str]) -> int:
    import numpy as np
    from PIL import Image

    from ldm_jax.cli import labels
    from ldm_jax.data import grid
    from ldm_jax.diffusion import seeds
    from ldm_jax.evaluation import generate, npz, prompt_list
    from ldm_jax.runs import checkpoint
    from ldm_jax.training import experiment, sampling

    seeds.check("--seed", args.seed)
    checks.number("num", args.num, 1, checks.MOST_IMAGES)
    for flag, value in (("columns", args.columns), ("batch-size", args.batch_size)):
        checks.number(flag, value, 1)
    for words in args.text:
        checks.text("text", words)
    out = checks.folder("out", args.out)
    config = experiment.read_config(pathlib.Path(args.workdir))
    if config.task.name != "diffusion":
        raise ValueError(f"{args.workdir} holds a run of the task {config.task.name!r}; only 'diffusion' draws images")
    if args.prompts and args.text:
        raise ValueError(f"--prompts={args.prompts} does not go with --text")
    settings = settings_from(config, args)
    model = experiment.restore(args.workdir, args.step, args.ema, args.first_stage)
    texts = prompt_list.read(model, args.prompts, args.num) if args.prompts else args.text
    classes, words = model.model.conditioning.num_classes, [word for word in args.label.split(",") if word]
    if words and not classes:
        raise ValueError("--label: this model takes no labels")
    numbers = labels.read(args.label, dict(enumerate(model.facts["class_names"])), classes)
    what = generate.asked(model, args.num, numbers, texts)
    checks.consistency(settings.name, distilled=False)
    sampling.make_generate(model.model, settings)  # what does not fit this model is said before anything is written
    made_by = {
        "workdir": str(pathlib.Path(args.workdir).absolute()),
        "step": model.step,
        "checkpoint": model.sha256,
        "ema": args.ema or experiment.default_average(config) or "none",
        "seed": args.seed,
        **{"sampler" if k == "name" else k: v for k, v in settings._asdict().items()},
        "labels": words,
        "prompts": texts,
    }
    if args.first_stage:
        made_by["first_stage"] = str(pathlib.Path(args.first_stage).absolute())
    record = out / "settings.json"
    # A record from before there was such a setting: drawn with its default.
    defaults = {k: v for k, v in sampling.Settings()._asdict().items() if k in made_by}
    if record.exists() and {**defaults, **json.loads(record.read_text())} != made_by:
        raise ValueError(f"--out={out} holds images drawn with other settings ({record}); take another folder")
    if (out / "samples.npz").exists() and not record.exists():
        raise ValueError(f"--out={out} holds images of another origin; take another folder")
    batches = generate.draw(
        model,
        settings,
        what,
        count=args.num,
        seed=args.seed,
        tokenizer=experiment.tokenizer(config),
        batch_size=args.batch_size or config.sampler.batch_size,
        quiet=args.quiet,
    )
    begun, broken = [], None
    try:
        begun = [next(batches)]
    except generate.NotFinite as error:
        if not error.images:  # what cannot be drawn leaves nothing behind
            raise
        broken = error
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(record, json.dumps(made_by, indent=1) + "\n")
    first: list[np.ndarray] = []

    def drawn() -> Iterator[np.ndarray]:
        """Batch by batch, each written as it comes: what is whole when this is stopped stays."""
        start = 0
        if broken is not None:
            raise broken
        for batch in itertools.chain(begun, batches):
            for i, image in enumerate(batch, start):
                Image.fromarray(image).save(out / f"{i:06d}.png")
            first.extend(batch[: max(SHOWN - start, 0)])
            start += len(batch)
            yield batch

    try:
        npz.write(out / "samples.npz", drawn(), args.num, what.labels)
    except generate.NotFinite as error:
        for i, image in error.images.items():
            Image.fromarray(image).save(out / f"{i:06d}.png")
        raise
    captions = what.prompts[: len(first)] if what.prompts else None
    grid.save(out / "grid.png", np.stack(first), args.columns, labels=captions)
    print(f"{args.num} images in {out} (grid.png, samples.npz)")
    return 0
