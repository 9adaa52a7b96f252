"""Draw images with a published pipeline: a folder with model_index.json, or a single-file checkpoint.

  ldm generate --model=stable-diffusion-v1-5 --prompt="a (red:1.3) fox in the snow" --negative=blurry --steps=30 --num=4 --out=foxes
  ldm generate --model=sd15 --prompt="in the style of van Gogh" --init-image=house.png --strength=0.6
  ldm generate --model=sd15-inpainting --prompt="a dog on a bench" --init-image=park.png --mask=bench.png
  ldm generate --model=instruct-pix2pix --prompt="make it winter" --init-image=park.png --image-guidance=1.6
  ldm generate --model=sdxl-base --refiner=sdxl-refiner --handover=0.8 --prompt="a lighthouse" --steps=40
  ldm generate --model=sd15 --prompt="a cat" --to-prompt="a tiger" --to-seed=7 --num=8
  ldm generate --model=ddpm-cifar10 --num=16 --steps=100 --sampler=ddim

Writes NNNNNN.png with prompt, seed and settings in each file's metadata, as soon as it is drawn (numbers go on where the folder's end),
NNNNNN.npy on --keep-latents, and grid.png. Image i depends on the model, the settings, the seed and i alone. --model=hub:OWNER/NAME
fetches by name;
nothing else touches the network. Sampler, spacing and noise are those of the pipeline's own file; --sampler changes the update rule
alone,
--grid the spacing alone.
"""

import argparse
import json
import pathlib
import sys
import zipfile
from typing import Any

from ldm_jax.cli import checks

# Spacings of published schedulers, by the names of schedules.respacing.GRIDS; --help is not to import jax.
SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "beta", "lu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|FILE", help="a pipeline's folder, a single file, or hub:OWNER/NAME")
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
    add("--sampler", metavar="NAME", help="update rule; `ldm samplers` lists them (default: the published one)")
    add("--grid", metavar="NAME", help=f"spacing of the steps: {', '.join(SPACINGS)} (the published one)")
    add("--steps", type=int, metavar="N", help="steps of the sampler (50; as published where a model takes others)")
    add(
        "--guidance",
        type=float,
        metavar="W",
        help="scale of classifier-free guidance; 1 and less (as 0, for Turbo models): none (7.5; without words: 1)",
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


def size_of(text: str | None) -> tuple[int, int] | None:
    """'512x768' -> (512, 768), height first; '512' -> (512, 512)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() for part in parts):
        raise ValueError(f"--size={text}; expected HxW in pixels, as 512x768")
    return int(parts[0]), int(parts[-1])


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


def check(args: argparse.Namespace) -> None:
    """What can be wrong with the flags by themselves, said before a minute is spent on loading."""
    from ldm_jax.diffusion import seeds
    from ldm_jax.diffusion.guidance import check_rescale, check_scale
    from ldm_jax.diffusion.samplers import SAMPLERS

    if args.sampler is not None and args.sampler not in SAMPLERS:
        raise ValueError(f"--sampler={args.sampler} is unknown; there are {', '.join(sorted(SAMPLERS))}")
    if args.grid is not None and args.grid not in SPACINGS:
        raise ValueError(f"--grid={args.grid} is unknown; there are {', '.join(SPACINGS)}")
    checks.number("steps", args.steps, 1, checks.MOST_STEPS)
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
    size_of(args.size)
    if args.handover is not None and not 0 < args.handover < 1:
        raise ValueError(f"--handover={args.handover}; expected a number between 0 and 1")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise ValueError(f"--strength={args.strength}; expected a number in (0, 1]")
    check_scale("--guidance", args.guidance or 0.0)
    check_scale("--image-guidance", args.image_guidance or 0.0)
    check_rescale("--rescale", args.rescale or 0.0)
    if args.tile is not None and args.tile < 1:
        raise ValueError(f"--tile={args.tile}; expected pixels")
    for flag, value in (
        ("--mask", args.mask),
        ("--depth", args.depth),
        ("--vary", args.vary),
        ("--strength", args.strength),
    ):
        if value is not None and not args.init_image:
            raise ValueError(f"{flag}={value} needs --init-image")
    for flag, path in (
        *(("--init-image", path) for path in args.init_image),
        ("--mask", args.mask),
        ("--depth", args.depth),
        ("--latents", args.latents),
    ):
        if path is not None and not pathlib.Path(path).is_file():
            raise ValueError(f"{flag}={path}: no such file")
    if (args.to_prompt is not None or args.to_seed is not None) and (len(args.prompt) != 1 or args.init_image):
        raise ValueError("--to-prompt and --to-seed go with one --prompt and no --init-image")


# What each way of drawing takes besides model, prompt, sampler, steps, size, seed, num and where it all goes.
MODES = {
    "classes": ("label", "guidance", "latents"),
    "interpolation": ("to_prompt", "to_seed", "negative", "guidance"),
    "text": ("negative", "guidance", "rescale", "latents"),
    "refined text": ("negative", "guidance", "rescale", "latents", "refiner", "handover"),
    "variation": ("init_image", "vary", "negative", "guidance", "rescale"),
    "inpainting": ("init_image", "mask", "strength", "negative", "guidance", "rescale", "latents"),
    "instruction": ("init_image", "image_guidance", "negative", "guidance", "rescale", "latents"),
    "picture": ("init_image", "strength", "depth", "negative", "guidance", "rescale", "latents"),
}
# Steps as published, where 50 would be far from it.
STEPS = {
    "DDPMPipeline": 1000,
    "ScoreSdeVePipeline": 2000,
    "ConsistencyModelPipeline": 1,
    "LatentConsistencyModelPipeline": 4,
    "LatentConsistencyModelImg2ImgPipeline": 4,
    "StableDiffusionInstructPix2PixPipeline": 100,
}


def mode_of(args: argparse.Namespace, pipeline: Any) -> str:
    """The way of drawing that flags and model ask for. ValueError for a flag that would do nothing there."""
    if not pipeline.text:
        mode = "classes"
    elif args.to_prompt is not None or args.to_seed is not None:
        mode = "interpolation"
    elif not args.init_image:
        mode = "refined text" if args.refiner else "text"
    elif args.vary is not None:
        mode = "variation"
    elif args.mask is not None:
        mode = "inpainting"
    else:
        mode = "instruction" if "Pix2Pix" in pipeline.name else "picture"
    for flag in sorted({flag for flags in MODES.values() for flag in flags} - set(MODES[mode])):
        if getattr(args, flag) not in (None, [], ""):
            raise ValueError(f"--{flag.replace('_', '-')} does nothing for {mode} by {pipeline.name}")
    if mode == "classes" and args.prompt:
        raise ValueError(f"--prompt: {pipeline.name} takes none")
    if mode != "classes" and not args.prompt:
        raise ValueError(f"--prompt: {pipeline.name} needs one")
    if (why := unguided(args, pipeline)) is not None:
        for flag, value in (("--negative", args.negative), ("--rescale", args.rescale or None)):
            if value is not None:
                raise ValueError(f"{flag} does nothing with {why}")
    return mode


def unguided(args: argparse.Namespace, pipeline: Any) -> str | None:
    """Why there is no guidance, None where there is."""
    if getattr(pipeline.denoiser.module, "time_cond_proj_dim", None) is not None:
        return f"{pipeline.name}, whose network is told its scale"
    if args.guidance is not None and args.guidance <= 1:
        return f"--guidance={args.guidance:g}: at most 1 means unguided"
    if args.image_guidance is not None and args.image_guidance < 1:
        return f"--image-guidance={args.image_guidance:g}: below 1 means unguided"
    return None


def complete(args: argparse.Namespace, pipeline: Any, mode: str) -> None:
    """Fill in what was not given: what is drawn with is what each picture says of itself."""
    defaults = {
        "steps": STEPS.get(pipeline.name, 50),
        "guidance": 7.5 if pipeline.text else 1.0,
        "sampler": "ddim" if mode == "variation" else None,
        "strength": {"inpainting": 1.0, "picture": 0.8}.get(mode),
        "image_guidance": 1.5 if mode == "instruction" else None,
        "handover": 0.8 if mode == "refined text" else None,
        "rescale": 0.0 if "rescale" in MODES[mode] else None,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def draw(pipeline: Any, refiner: Any, args: argparse.Namespace, mode: str, rows: range, given: dict[str, list]) -> Any:
    """f32[len(rows), h, w, C]: latents of these images, or what pixel models draw, as pipelines.pictures takes them.

    `given`: prompts, pictures, labels and noise, which go round where there are more images.
    """
    import numpy as np

    def told(name: str) -> list:
        return [given[name][i % len(given[name])] for i in rows]

    shared = {
        "steps": args.steps,
        "sampler": args.sampler,
        "size": size_of(args.size),
        "guidance": args.guidance,
        "batch_size": args.batch_size,
        "quiet": args.quiet,
        "decode": False,
    }
    if mode == "interpolation":
        (prompt,) = args.prompt
        prompts = prompt, prompt if args.to_prompt is None else args.to_prompt
        seeds = args.seed, args.seed if args.to_seed is None else args.to_seed
        return pipeline.interpolate(prompts, seeds, num=len(rows), negative=args.negative, **shared)
    shared |= {"seed": args.seed, "first": rows[0]}
    if given["latents"]:
        shared["latents"] = np.stack(told("latents"))
    if mode == "classes":
        return pipeline.draw(len(rows), given["labels"] or None, **shared)
    shared |= {"prompts": told("prompts"), "negative": args.negative, "rescale": args.rescale}
    if mode == "text":
        return pipeline.text_to_image(**shared)
    if mode == "refined text":
        z = pipeline.text_to_image(**shared, end=args.handover)
        shared = {name: value for name, value in shared.items() if name not in ("latents", "size")}
        return refiner.image_to_image(images=z, start=args.handover, **shared)
    # One picture for all is encoded once.
    shared["images"] = given["images"] if len(given["images"]) == 1 else told("images")
    if mode == "variation":
        return pipeline.vary(source=args.vary, **shared)
    if mode == "inpainting":
        return pipeline.inpaint(masks=picture("--mask", args.mask), strength=args.strength, **shared)
    if mode == "instruction":
        return pipeline.edit(image_guidance=args.image_guidance, **shared)
    if args.depth is not None:
        depth = array("--depth", args.depth) if args.depth.endswith(".npy") else picture("--depth", args.depth)
        shared["depth"] = np.asarray(depth, np.float32)
    return pipeline.image_to_image(strength=args.strength, **shared)


def labels_of(text: str, pipeline: Any) -> list[int]:
    """The classes that --label gives, by number or by a name of the pipeline's id2label."""
    from ldm_jax.cli import labels
    from ldm_jax.pipelines.conditions import classes_of

    classes = classes_of(pipeline)
    if text and classes is None:
        raise ValueError(f"--label={text}: {pipeline.name} has no classes")
    names = pipeline.options.get("id2label") or {}
    return labels.read(text, {int(i): name for i, name in names.items()}, classes or 0)


def read(args: argparse.Namespace, mode: str, pipeline: Any) -> tuple[dict[str, list], int]:
    """(what the images are told, how many images). ValueError for what cannot be read, or more of it than images."""
    given = {
        "prompts": args.prompt,
        "labels": labels_of(args.label, pipeline),
        "images": [picture("--init-image", path) for path in args.init_image],
        "latents": [] if args.latents is None else list(array("--latents", args.latents)),
    }
    most = max(map(len, given.values()))
    count = args.num or (8 if mode == "interpolation" else max(most, 1))
    if count < most:
        raise ValueError(f"--num={count}, but {most} prompts, pictures, labels or rows of noise are given")
    return given, count


def run(args: argparse.Namespace, rest: list[str]) -> int:
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ldm_jax import pipelines, schedules
    from ldm_jax.data import grid
    from ldm_jax.runs.stopped import Stopped

    check(args)
    out = pathlib.Path(args.out)
    options = {"dtype": args.dtype, "offload": args.offload, "tile": args.tile}
    pipeline = pipelines.load(args.model, tokenizer=args.tokenizer, prediction=args.prediction, **options)
    mode = mode_of(args, pipeline)
    refiner = None
    if args.refiner:
        if args.grid is not None:
            raise ValueError("--grid does not go with --refiner: both go on one published grid")
        words = args.tokenizer if pathlib.Path(args.refiner).is_file() else None
        refiner = pipelines.load(args.refiner, tokenizer=words, **options)
    told_scale = getattr(pipeline.denoiser.module, "time_cond_proj_dim", None) is not None
    checks.consistency(args.sampler, told_scale or pipeline.schedule.sampler in ("lcm", "tcd"))
    complete(args, pipeline, mode)
    if args.grid is not None:
        # The rule is said beside its grid, which may be another class's.
        rule = args.sampler or pipeline.schedule.sampler
        pipeline = pipeline._replace(schedule=schedules.respaced(pipeline.schedule, args.grid, args.sampler))
        args.sampler = None if pipeline.schedule.sampler == rule else rule
    given, count = read(args, mode, pipeline)
    settings = {k: v for k, v in vars(args).items() if v not in (None, [], "") and k not in ("out", "quiet", "prompt")}
    settings["sampler"] = args.sampler or pipeline.schedule.sampler
    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()]
    first, moving = max(taken, default=-1) + 1, mode == "interpolation"
    size = count if moving else min(args.batch_size, count)
    told = [args.prompt[0 if moving else i % len(args.prompt)] for i in range(count)] if args.prompt else []
    images, bad = {}, []
    try:
        for start in range(0, count, size):
            # Every group is as large as the first, which the loop was compiled for; what is too many is not decoded.
            z = draw(pipeline, refiner, args, mode, range(start, start + size), given)[: count - start]
            for i, latent in enumerate(z, start):
                image = (
                    pipelines.pictures(refiner or pipeline, latent[None])[0] if np.isfinite(latent).all() else latent
                )
                if not np.isfinite(image).all():
                    bad.append(i)
                    continue
                out.mkdir(parents=True, exist_ok=True)
                images[i] = np.round(image * 255).astype(np.uint8)
                info = PngInfo()
                if told:
                    info.add_text("prompt", told[i], zip=False)
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
        return 130
    grid.save(
        out / "grid.png",
        np.stack([images[i] for i in range(count)][:100]),
        labels=None if moving or not told else told[:100],
    )
    print(f"{count} images in {out} ({first:06d}.png to {first + count - 1:06d}.png, grid.png)")
    return 0
