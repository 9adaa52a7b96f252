"""Draw images from a trained run.

  ldm sample --workdir=runs/quickstart --num=8 --out=out --text="a small red circle above a large blue square"
  ldm sample --workdir=runs/emoji64 --num=64 --out=out --prompts=split:test_style
  ldm sample --workdir=runs/cifar10 --num=100 --out=out --label=cat,dog --sampler=dpmpp_2m --steps=20 --guidance=2
  ldm sample --workdir=runs/cifar10 --num=100 --out=out --guidance=4 --guidance-method=apg:eta=0,threshold=10

  ldm sample --workdir=runs/cifar10 --num=8 --out=out --guidance=1,2,4 --sampler=ddim,euler_ancestral
  ldm sample --workdir=runs/cifar10 --num=8 --out=out --guidance=0 --classifier=runs/noisy --classifier-scale=0,1,2,4

Writes NNNNNN.png (one an image), samples.npz (ADM's: arr_0 u8[N,H,W,3], and arr_1 i64[N] where there are classes) and grid.png,
labelled with classes or prompts. Several values of --guidance, --classifier-scale or --sampler draw the same seeds once for each, side
by side in one grid (and write no samples.npz). --classifier guides by a classifier of noisy data, whose labels are those of the images;
--guidance=0 draws the null class, so that the classifier alone says what is to be seen.
Labels and prompts are repeated in order; without any, every class in turn, or captions of the tuning split. A run that is conditioned
on pictures (inpainting, super-resolution) takes them from the tuning split, or from that of --prompts=split:NAME; CONDITION.png shows
what each image was drawn under. `ldm generate` takes them from files. Image i depends on the checkpoint, the settings, the seed and i
alone. What the flags leave open is taken from the run's config.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ldm_jax.cli import checks, drawing

if TYPE_CHECKING:
    import numpy as np

    from ldm_jax.training import sampling
    from ldm_jax.training.experiment import Experiment


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
    drawing.add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="0 to 2**64 - 1 (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def settings_from(config: "Experiment", args: argparse.Namespace) -> "sampling.Settings":
    """The settings of the run, with those of the command line over them."""
    from ldm_jax.training import sampling

    settings, fields = config.sampler, drawing.chosen(args)
    checks.scale("guidance", fields.get("guidance"))
    for _, key, options in drawing.FLAGS:
        # The run's options stay with the name that they belong to.
        if key in fields and not fields[options] and fields[key] == getattr(settings, key):
            del fields[options]
    settings = settings._replace(**fields)
    sampling.check(settings)
    return settings


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax import plugins
    from ldm_jax.cli import labels
    from ldm_jax.diffusion import seeds
    from ldm_jax.evaluation import generate, prompt_list
    from ldm_jax.training import classifier_guidance, experiment, restore, sampling

    seeds.check("--seed", args.seed)
    checks.number("num", args.num, 1, checks.MOST_IMAGES)
    for flag, value in (("columns", args.columns), ("batch-size", args.batch_size)):
        checks.number(flag, value, 1)
    for words in args.text:
        checks.text("text", words)
    out = checks.folder("out", args.out)
    config = experiment.of_run(args.workdir)
    if args.prompts and args.text:
        raise ValueError(f"--prompts={args.prompts} does not go with --text")
    made = drawing.variants(args)
    guides, ways = [drawing.classifier(variant) for variant in made], [settings_from(config, v) for v in made]
    model = restore.restore(args.workdir, args.step, args.ema, args.first_stage)
    if model.model.data.entry != "image":
        raise ValueError(
            f"{args.workdir} models {model.model.data.entry} of shape {model.model.shape}; `ldm sample` draws images, and "
            "ldm_jax.sampling.draw what there is"
        )
    runs = [model] * len(made)
    if args.classifier is not None:
        classifier = classifier_guidance.read(args.classifier, model)
        runs = [classifier_guidance.guided(model, classifier, scale) for _, scale in guides]
        model = runs[0]
    texts = prompt_list.read(model, args.prompts, args.num) if args.prompts else args.text
    classes, words = sampling.classes(model.model), [word for word in args.label.split(",") if word]
    if words and not classes:
        raise ValueError("--label: this model takes no labels")
    names = dict(enumerate(model.dataset["class_names"]))
    split = args.prompts.removeprefix("split:") if args.prompts.startswith("split:") else None
    what = generate.asked(model, args.num, labels.read(args.label, names, classes), texts, split)
    if what.split and not args.quiet:
        print(f"conditions ({', '.join(model.model.conditioning.rows)}): the images of split:{what.split}, in order")
    for settings in ways:
        checks.consistency(settings.name, distilled=False)
        sampling.make_generate(model.model, settings)  # what does not fit this model is said before anything is written
    origin = {
        "workdir": str(pathlib.Path(args.workdir).absolute()),
        "step": model.step,
        "checkpoint": model.sha256,
        "ema": args.ema or config.average or "none",
        "seed": args.seed,
    }
    asked = {"labels": words, "prompts": texts}
    if args.in_use:
        asked["plugins"] = plugins.contents(args.in_use)
    if what.split:
        asked["conditions"] = f"split:{what.split}"
    if args.first_stage:
        asked["first_stage"] = str(pathlib.Path(args.first_stage).absolute())

    def batches(way: int) -> "Iterator[np.ndarray]":
        return generate.draw(
            runs[way],
            ways[way],
            what,
            count=args.num,
            seed=args.seed,
            tokenizer=config.tokenizer,
            batch_size=args.batch_size or config.sample_batch_size,
            quiet=args.quiet,
        )

    captions = what.prompts or (None if what.labels is None else [names.get(int(y), str(y)) for y in what.labels])
    shown = captions and captions[: drawing.SHOWN]
    drawn = [settings._asdict() for settings in ways]
    if args.classifier is not None:
        asked["classifier"] = classifier.sha256
        drawn = [way | {"classifier_scale": scale} for way, (_, scale) in zip(drawn, guides)]
    if len(made) > 1:
        code = compare(args, out, origin | {"drawn": drawn} | asked, made, batches, shown)
    else:
        made_by = {**origin, **{"sampler" if k == "name" else k: v for k, v in drawn[0].items()}, **asked}
        # A record from before there was such a setting: drawn with its default.
        check_folder(out, made_by, {k: v for k, v in sampling.Settings()._asdict().items() if k in made_by})
        code = one_way(args, out, made_by, batches(0), what.labels, shown)
    write_conditions(out, generate.shown(model, what, args.seed, min(args.num, drawing.SHOWN)), args.columns, shown)
    return code


def write_conditions(
    out: pathlib.Path, pictures: "dict[str, np.ndarray]", columns: int | None, captions: list[str] | None
) -> None:
    """Write CONDITION.png, a grid of what each image of grid.png was drawn under, for each condition that is a picture."""
    from ldm_jax.data import contact_sheet

    for name, images in pictures.items():
        contact_sheet.save(out / f"{name}.png", images, columns, labels=captions)


def check_folder(out: pathlib.Path, made_by: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ValueError for a folder that holds images of other settings, or of another origin."""
    record = out / "settings.json"
    if record.exists() and {**defaults, **json.loads(record.read_text())} != made_by:
        raise ValueError(f"--out={out} holds images drawn with other settings ({record}); take another folder")
    if (out / "samples.npz").exists() and not record.exists():
        raise ValueError(f"--out={out} holds images of another origin; take another folder")


def one_way(
    args: argparse.Namespace,
    out: pathlib.Path,
    made_by: dict[str, Any],
    batches: "Iterator[np.ndarray]",
    labels: "np.ndarray | None",
    captions: list[str] | None,
) -> int:
    """Write images, samples.npz, settings.json and the grid."""
    import numpy as np
    from PIL import Image

    from ldm_jax.data import contact_sheet
    from ldm_jax.evaluation import generate, npz
    from ldm_jax.runs import checkpoint

    begun, broken = [], None
    try:
        begun = [next(batches)]
    except generate.NotFinite as error:
        if not error.images:  # what cannot be drawn leaves nothing behind
            raise
        broken = error
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(out / "settings.json", json.dumps(made_by, indent=1) + "\n")
    first: list[np.ndarray] = []

    def drawn() -> Iterator[np.ndarray]:
        """Batch by batch, each written as it comes: what is whole when this is stopped stays."""
        start = 0
        if broken is not None:
            raise broken
        for batch in itertools.chain(begun, batches):
            for i, image in enumerate(batch, start):
                Image.fromarray(image).save(out / f"{i:06d}.png")
            first.extend(batch[: max(drawing.SHOWN - start, 0)])
            start += len(batch)
            yield batch

    try:
        npz.write(out / "samples.npz", drawn(), args.num, labels)
    except generate.NotFinite as error:
        for i, image in error.images.items():
            Image.fromarray(image).save(out / f"{i:06d}.png")
        raise
    contact_sheet.save(out / "grid.png", np.stack(first), args.columns, labels=captions)
    print(f"{args.num} images in {out} (grid.png, samples.npz)")
    return 0


def compare(
    args: argparse.Namespace,
    out: pathlib.Path,
    made_by: dict[str, Any],
    made: list[argparse.Namespace],
    batches: "Callable[[int], Iterator[np.ndarray]]",
    captions: list[str] | None,
) -> int:
    """Draw the same seeds in several ways, and one grid of them. There is no samples.npz: such images are no sample of one model."""
    from PIL import Image

    from ldm_jax.data import contact_sheet
    from ldm_jax.runs import checkpoint

    check_folder(out, made_by, {})
    images: list[list[np.ndarray]] = []
    for n in range(len(made)):
        images.append([])
        for batch in batches(n):
            if not images[0]:
                out.mkdir(parents=True, exist_ok=True)
                checkpoint.write_text(out / "settings.json", json.dumps(made_by, indent=1) + "\n")
            for image in batch:
                Image.fromarray(image).save(out / f"{n * args.num + len(images[-1]):06d}.png")
                images[-1].append(image)
    cells, columns, labels = drawing.side_by_side(made, images, captions)
    contact_sheet.save(out / "grid.png", cells, columns, labels=labels)
    print(f"{len(made)} times {args.num} images in {out} (grid.png)")
    return 0
