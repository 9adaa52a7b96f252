"""Draw images with a published pipeline (a folder with model_index.json, or a single file) or with a run of `ldm train`.

  ldm generate --model=stable-diffusion-v1-5 --prompt="a (red:1.3) fox in the snow" --negative=blurry --steps=30 --num=4 --out=foxes
  ldm generate --model=sd15 --prompt="in the style of van Gogh" --init-image=house.png --strength=0.6
  ldm generate --model=sd15-inpainting --prompt="a dog on a bench" --init-image=park.png --mask=bench.png
  ldm generate --model=instruct-pix2pix --prompt="make it winter" --init-image=park.png --image-guidance=1.6
  ldm generate --model=sdxl-base --refiner=sdxl-refiner --handover=0.8 --prompt="a lighthouse" --steps=40
  ldm generate --model=sd15 --prompt="a cat" --to-prompt="a tiger" --to-seed=7 --num=8
  ldm generate --model=sd15 --prompt="a cat" --guidance=1,4,7.5 --sampler=ddim,dpmpp_2m --guidance-method=apg:eta=0
  ldm generate --model=ddpm-cifar10 --num=16 --steps=100 --sampler=ddim
  ldm generate --model=runs/cifar10 --label=cat --init-image=dog.png --strength=0.5
  ldm generate --model=runs/cifar10 --label=cat --guidance=0 --classifier=runs/noisy_classifier --classifier-scale=0,1,4

Writes NNNNNN.png with prompt, seed and settings in each file's metadata, as soon as it is drawn (numbers go on where the folder's end),
NNNNNN.npy on --keep-latents, and grid.png, labelled with prompts or classes. Image i depends on the model, the settings, the seed and i
alone. Several values of --guidance, --classifier-scale or --sampler draw the same seeds once for each, side by side in one grid.

--model=hub:OWNER/NAME fetches by name; nothing else touches the network. Sampler, spacing and noise of a published pipeline are those
of its own file, and --sampler changes the update rule alone, --grid the spacing alone. Those of a run are those of its config.
"""

import argparse
import json
import pathlib
import sys
import zipfile
from typing import TYPE_CHECKING, Any

from ldm_jax import plugins
from ldm_jax.cli import checks, drawing, modes

if TYPE_CHECKING:
    import numpy as np

# Spacings of published schedulers, by the names of schedules.respacing.GRIDS; --help is not to import jax.
SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "beta", "lu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR|FILE",
        help="a pipeline's folder, a single file, hub:OWNER/NAME, or a run of `ldm train`",
    )
    add("--step", type=int, metavar="N", help="of a run: which checkpoint; default: the newest")
    add("--ema", metavar="K", help="of a run: which average: its half-life in images; 'none': the raw parameters")
    add("--tokenizer", metavar="DIR", help="CLIP's vocabulary, a folder, which a single file lacks")
    add("--prediction", choices=("epsilon", "v_prediction"), help="what a single file predicts, where it cannot tell")
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="may be given several times; (word:1.3) weighs, ((a:1.2) b:1.5) nests",
    )
    add("--negative", metavar="TEXT", help="what to guide away from")
    add("--label", default="", metavar="A,B,...", help="classes, by number or name, for models of classes")
    add("--init-image", action="append", default=[], metavar="F", help="the picture to begin with, or to edit")
    add(
        "--mask",
        metavar="F",
        help="white is drawn anew, or what is opaque of a picture with transparency (with --init-image)",
    )
    add("--depth", metavar="F", help="a depth, as .npy or a grey picture (with --init-image, for depth models)")
    add(
        "--strength",
        type=float,
        metavar="S",
        help="how much of the way --init-image is noised, in (0, 1] (0.8; masks: 1)",
    )
    add("--vary", metavar="TEXT", help="variations by inversion: what --init-image shows; --prompt is what it becomes")
    add("--to-prompt", metavar="TEXT", help="num images on the way from --prompt to this")
    add("--to-seed", type=int, metavar="S", help="... and from --seed to this")
    add("--refiner", metavar="DIR", help="SDXL's second pipeline, which goes on where --model leaves off")
    add("--handover", type=float, metavar="F", help="at this fraction of the way (0.8)")
    drawing.add_arguments(
        parser, grid=f"spacing of the steps: {', '.join(SPACINGS)}; of a run, a name that `ldm samplers` lists"
    )
    add(
        "--image-guidance",
        type=float,
        metavar="W",
        help="of the picture, for InstructPix2Pix; below 1: no guidance (1.5)",
    )
    add("--rescale", type=float, metavar="R", help="pull the guided spread back, in [0, 1] (0)")
    add("--seed", type=int, default=0, metavar="S", help="0 to 2**64 - 1 (0)")
    add("--latents", metavar="F.npy", help="initial noise f32[N or 1, h, w, C] of unit variance")
    add("--keep-latents", action="store_true", help="write what the autoencoder decodes, beside the pictures")
    add("--size", metavar="HxW", help="pixels, multiples of 8 for Stable Diffusion (what it was trained for)")
    add("--num", type=int, metavar="N", help="how many images; prompts are repeated in order (default: one a prompt)")
    add("--batch-size", type=int, default=4, metavar="B", help="images at a time; changes no image (4)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute and weights (float32)")
    add("--offload", action="store_true", help="text encoder, denoiser and decoder on the device one at a time")
    add("--tile", type=int, metavar="P", help="encode and decode in tiles of P pixels, for large pictures")
    add("--out", default="out", metavar="DIR", help="(out)")
    add("--quiet", action="store_true", help="no progress bar")


def picture(flag: str, path: str) -> Any:
    """The picture of a flag, PIL, by the rule of data/decode.py (--mask: as a mask). ValueError, naming both, if it cannot be read."""
    from PIL import Image

    from ldm_jax.data import decode

    where = f"{flag}={path}"
    if flag != "--depth":
        read = decode.decode_mask if flag == "--mask" else decode.decode
        return Image.fromarray(read(pathlib.Path(path).read_bytes(), where))
    try:
        with Image.open(path) as image:
            # 16-bit greys are depths of many levels, which a conversion would clip to the lowest 256.
            return image.copy() if image.mode in ("I", "F") or image.mode.startswith("I;16") else image.convert("L")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: not a picture that can be read ({error})") from None


def array(flag: str, path: str) -> Any:
    import numpy as np

    try:
        read = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{flag}={path}: not an .npy file of numbers ({error})") from None
    if not isinstance(read, np.ndarray):
        raise ValueError(f"{flag}={path}: holds several arrays, expected an .npy file of one")
    if read.dtype.kind not in "biuf" or not read.ndim:
        raise ValueError(f"{flag}={path}: holds {read.dtype}{list(read.shape)}, expected an array of real numbers")
    if flag == "--latents" and read.ndim != 4:
        raise ValueError(f"{flag}={path}: has shape {read.shape}, expected [N or 1, h, w, C]")
    if not np.isfinite(read.astype(np.float32)).all():
        raise ValueError(f"{flag}={path}: holds NaN or infinite values, expected finite numbers")
    return read


def check(args: argparse.Namespace, is_run: bool) -> None:
    """What can be wrong with the flags by themselves, said before a minute is spent on loading."""
    from ldm_jax.diffusion import seeds
    from ldm_jax.diffusion.guidance import check_rescale, check_scale
    from ldm_jax.diffusion.samplers import SAMPLERS
    from ldm_jax.sampling.settings import Settings, check_guidance, check_sampler

    for variant in drawing.variants(args):
        fields = drawing.chosen(variant)
        sampler = fields.pop("name", None)
        if sampler is not None and sampler not in SAMPLERS:
            raise ValueError(f"--sampler={sampler} is unknown; there are {', '.join(sorted(SAMPLERS))}")
        if sampler is not None:
            check_sampler(sampler, fields.pop("options"))
        if not is_run and args.grid is not None and args.grid not in SPACINGS:
            raise ValueError(f"--grid={args.grid} is unknown; there are {', '.join(SPACINGS)}")
        check_scale("--guidance", fields.get("guidance") or 0.0)
        check_guidance(Settings(**fields))
        drawing.classifier(variant)
    checks.number("num", args.num, 1, checks.MOST_IMAGES)
    checks.number("batch-size", args.batch_size, 1)
    checks.folder("out", args.out)
    for flag, words in (("negative", args.negative), ("vary", args.vary), ("to-prompt", args.to_prompt)):
        checks.text(flag, words)
    for words in args.prompt:
        checks.text("prompt", words)
    for flag, value in (("--seed", args.seed), ("--to-seed", args.to_seed)):
        if value is not None:
            seeds.check(flag, value)
    modes.size_of(args.size)
    if args.handover is not None and not 0 < args.handover < 1:
        raise ValueError(f"--handover={args.handover}; expected a number between 0 and 1")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise ValueError(f"--strength={args.strength}; expected a number in (0, 1]")
    check_scale("--image-guidance", args.image_guidance or 0.0)
    check_rescale("--rescale", args.rescale or 0.0)
    if args.tile is not None and args.tile < 1:
        raise ValueError(f"--tile={args.tile}; expected pixels")
    for flag in ("mask", "depth", "vary", "strength"):
        value = getattr(args, flag)
        if value is not None and not args.init_image:
            raise ValueError(f"--{flag}={value} needs --init-image")
    for flag, path in (
        *(("--init-image", path) for path in args.init_image),
        ("--mask", args.mask),
        ("--depth", args.depth),
        ("--latents", args.latents),
    ):
        if path is not None and not pathlib.Path(path).is_file():
            raise ValueError(f"{flag}={path}: no such file")
    if (args.to_prompt is not None or args.to_seed is not None) and (len(args.prompt) > 1 or args.init_image):
        raise ValueError("--to-prompt and --to-seed go with one --prompt and no --init-image")
    of_run, of_file = ("step", "ema", "classifier"), ("tokenizer", "prediction", "refiner", "depth")
    for flag in of_file if is_run else of_run:
        if getattr(args, flag) is not None:
            what = "a published pipeline" if is_run else "a run of `ldm train`"
            raise ValueError(f"--{flag}={getattr(args, flag)} goes with {what}; --model={args.model} is none")
    if is_run and args.dtype != "float32":
        raise ValueError(f"--dtype={args.dtype} goes with a published pipeline; a run computes as its config says")


def load(args: argparse.Namespace, is_run: bool) -> Any:
    """The pipeline of --model."""
    from ldm_jax import pipelines

    if is_run:
        from ldm_jax.training import drawable, restore

        run = restore.restore(args.model, args.step, args.ema)
        return drawable.pipeline(run, args.model, offload=args.offload, tile=args.tile)
    options = {"dtype": args.dtype, "offload": args.offload, "tile": args.tile}
    return pipelines.load(args.model, tokenizer=args.tokenizer, prediction=args.prediction, **options)


def guided(args: argparse.Namespace, made: list[argparse.Namespace], pipeline: Any) -> list[Any]:
    """The pipeline of each variant: guided by --classifier at its scale, or as it is."""
    if args.classifier is None:
        return [pipeline] * len(made)
    from ldm_jax.training import classifier_guidance, drawable

    run = pipeline.parts
    classifier = classifier_guidance.read(args.classifier, run)
    runs = [classifier_guidance.guided(run, classifier, drawing.classifier(variant)[1]) for variant in made]
    return [drawable.pipeline(run, args.model, offload=args.offload, tile=args.tile) for run in runs]


def load_refiner(args: argparse.Namespace) -> Any:
    """The pipeline of --refiner."""
    from ldm_jax import pipelines

    if args.grid is not None:
        raise ValueError("--grid does not go with --refiner: both go on one published grid")
    words = args.tokenizer if pathlib.Path(args.refiner).is_file() else None
    return pipelines.load(args.refiner, tokenizer=words, dtype=args.dtype, offload=args.offload, tile=args.tile)


def read(args: argparse.Namespace, mode: str, pipeline: Any) -> tuple[modes.Inputs, int]:
    """(what the images are drawn from, how many images). ValueError for what cannot be read, or more of it than images."""
    import numpy as np

    from ldm_jax.cli import labels

    classes, depth = pipeline.takes.classes, None
    if args.label and classes is None:
        raise ValueError(f"--label={args.label}: {pipeline.name} has no classes")
    if args.depth is not None:
        depth = array("--depth", args.depth) if args.depth.endswith(".npy") else picture("--depth", args.depth)
        depth = np.asarray(depth, np.float32)
    inputs = modes.Inputs(
        args.prompt,
        labels.read(args.label, pipeline.class_names, classes or 0),
        [picture("--init-image", path) for path in args.init_image],
        [] if args.latents is None else list(array("--latents", args.latents)),
        None if args.mask is None else picture("--mask", args.mask),
        depth,
    )
    most = max(map(len, inputs[:4]))
    count = args.num or (8 if mode == "interpolation" else max(most, 1))
    if count < most:
        raise ValueError(f"--num={count}, but {most} prompts, pictures, labels or rows of noise are given")
    return inputs, count


def complete(args: argparse.Namespace, pipeline: Any, mode: str) -> dict[str, Any]:
    """Fill in the defaults of the mode; what each picture says of itself: the flags of the command line, and how it is drawn."""
    for name, value in modes.MODES[mode].defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    settings = pipeline.settings(modes.how(args))
    left_out = ("out", "quiet", "prompt", "in_use", *drawing.LISTS, *(flag for flag, *_ in drawing.FLAGS))
    said = {k: v for k, v in vars(args).items() if v not in (None, [], "") and k not in left_out}
    said |= {"sampler": settings.name or pipeline.sampler, "steps": settings.steps, "guidance": settings.guidance}
    if args.classifier is not None:
        _, said["classifier_scale"] = drawing.classifier(args)
    if args.in_use:
        said["plugins"] = plugins.contents(args.in_use)
    plain = type(settings)._field_defaults
    return said | {
        k: v for k, v in settings._asdict().items() if k not in (*said, "name") and v != plain[k] and v != ""
    }


def captions_of(pipeline: Any, args: argparse.Namespace, mode: str, inputs: modes.Inputs, count: int) -> list[str]:
    """What each image is called in the grid: its prompt, its class, or both; [] where it has neither."""
    import numpy as np

    if mode == "interpolation":
        ends = [args.prompt[0], args.to_prompt or args.prompt[0]] if args.prompt else ["", ""]
        ends = [f"{end} (seed {seed})".strip() for end, seed in zip(ends, (args.seed, args.to_seed or args.seed))]
        return [ends[0], *(f"{w:.2f}" for w in np.linspace(0, 1, count)[1:-1]), ends[1]][:count]
    words = [[] for _ in range(count)]
    if inputs.prompts:
        words = [[inputs.prompts[i % len(inputs.prompts)]] for i in range(count)]
    if pipeline.takes.classes is not None:
        classes = inputs.labels or range(pipeline.takes.classes)
        for i, line in enumerate(words):
            label = classes[i % len(classes)]
            line.append(pipeline.class_names.get(label, str(label)))
    return [", ".join(line) for line in words] if any(words) else []


def write(
    args: argparse.Namespace, pipeline: Any, refiner: Any, mode: str, inputs: modes.Inputs, count: int, first: int
) -> "dict[int, np.ndarray]":
    """Draw `count` images and write them, from NNNNNN.png = `first` on, as they come: {i: u8[H, W, 3]}. Stopped for a NaN."""
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ldm_jax import pipelines
    from ldm_jax.runs.stopped import Stopped

    out, images, bad = pathlib.Path(args.out), {}, []
    settings, moving = complete(args, pipeline, mode), mode == "interpolation"
    size = count if moving else min(args.batch_size, count)
    try:
        for start in range(0, count, size):
            # Every group is as large as the first, which the loop was compiled for; what is too many is not decoded.
            z = draw(pipeline, refiner, args, mode, range(start, start + size), inputs)[: count - start]
            for i, latent in enumerate(z, start):
                image = latent
                if np.isfinite(latent).all():
                    image = pipelines.pictures(refiner or pipeline, latent[None])[0]
                if not np.isfinite(image).all():
                    bad.append(i)
                    continue
                out.mkdir(parents=True, exist_ok=True)
                images[i] = np.round(image * 255).astype(np.uint8)
                info = PngInfo()
                if inputs.prompts:
                    info.add_text("prompt", inputs.prompts[0 if moving else i % len(inputs.prompts)], zip=False)
                info.add_text("seed", str(args.seed))
                info.add_text("settings", json.dumps(settings | {"index": i}))
                Image.fromarray(images[i]).save(out / f"{first + i:06d}.png", pnginfo=info)
                if args.keep_latents:
                    np.save(out / f"{first + i:06d}.npy", latent[None])
            if bad:
                raise Stopped(
                    f"image {', '.join(map(str, bad))} of {count} came out NaN or infinite and is not written; "
                    f"{len(images)} are. Other --guidance, --sampler, --steps or --dtype may draw it"
                )
    except KeyboardInterrupt:
        print(f"\nldm generate: stopped; {len(images)} of {count} images are written", file=sys.stderr)
        raise Interrupted from None
    return images


class Interrupted(Exception):
    """Ctrl-C, after what was written has been said."""


def run(args: argparse.Namespace, rest: list[str]) -> int:
    import numpy as np

    from ldm_jax.data import contact_sheet
    from ldm_jax.runs.run import is_run

    of_run = pathlib.Path(args.model).is_dir() and is_run(args.model)
    check(args, of_run)
    made = drawing.variants(args)
    pipelines = guided(args, made, load(args, of_run))
    pipeline = pipelines[0]
    mode = modes.mode_of(args, pipeline)
    for variant in made:
        modes.check_guided(variant, pipeline)
        consistent = pipeline.takes.scale or pipeline.sampler in ("lcm", "tcd")
        checks.consistency(variant.sampler and drawing.named("--sampler", variant.sampler)[0], consistent)
    refiner = load_refiner(args) if args.refiner else None
    inputs, count = read(args, mode, pipeline)
    out = pathlib.Path(args.out)
    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()]
    first, drawn = max(taken, default=-1) + 1, []
    try:
        for n, variant in enumerate(made):
            drawn.append(write(variant, pipelines[n], refiner, mode, inputs, count, first + n * count))
    except Interrupted:
        return 130
    captions = captions_of(pipeline, args, mode, inputs, count)
    images = [[one[i] for i in range(count)] for one in drawn]
    if len(made) > 1:
        cells, columns, labels = drawing.side_by_side(made, images, captions)
        contact_sheet.save(out / "grid.png", cells, columns, labels=labels)
    else:
        shown = np.stack(images[0][: drawing.SHOWN])
        contact_sheet.save(out / "grid.png", shown, labels=captions[: drawing.SHOWN] or None)
    count *= len(made)
    print(f"{count} images in {out} ({first:06d}.png to {first + count - 1:06d}.png, grid.png)")
    return 0


draw = modes.draw
