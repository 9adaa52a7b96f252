"""Draw images with a published pipeline: a folder with model_index.json, or a single-file checkpoint.

  ldm generate --model=stable-diffusion-v1-5 --prompt="a (red:1.3) fox in the snow" --negative=blurry --steps=30 --num=4 --out=foxes
  ldm generate --model=sd15 --prompt="in the style of van Gogh" --init-image=house.png --strength=0.6
  ldm generate --model=sd15-inpainting --prompt="a dog on a bench" --init-image=park.png --mask=bench.png
  ldm generate --model=instruct-pix2pix --prompt="make it winter" --init-image=park.png --image-guidance=1.6
  ldm generate --model=sdxl-base --refiner=sdxl-refiner --handover=0.8 --prompt="a lighthouse" --steps=40
  ldm generate --model=sd15 --prompt="a cat" --to-prompt="a tiger" --to-seed=7 --num=8
  ldm generate --model=ddpm-cifar10 --num=16 --steps=100 --sampler=ddim

Writes NNNNNN.png with prompt, seed and settings in each file's metadata (numbers go on where the folder's end), latents.npy on
--keep-latents, and grid.png. Image i depends on the model, the settings, the seed and i alone. --model=hub:OWNER/NAME fetches by name;
nothing else touches the network. Sampler, spacing and noise are those of the pipeline's own file; --sampler changes the update rule
alone.
"""

import argparse
import json
import pathlib
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|FILE", help="a pipeline's folder, a single file, or hub:OWNER/NAME")
    add("--tokenizer", metavar="DIR", help="the tokenizer's folder, which a single file lacks")
    add("--prediction", choices=("epsilon", "v_prediction"), help="what a single file predicts, where it cannot tell")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times; (word:1.3) weighs")
    add("--negative", metavar="TEXT", help="what to guide away from")
    add("--label", default="", metavar="A,B,...", help="class numbers, for models of classes")
    add("--init-image", action="append", default=[], metavar="F", help="the picture to begin with, or to edit")
    add("--mask", metavar="F", help="white: drawn anew (with --init-image)")
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
    add("--handover", type=float, default=0.8, metavar="F", help="at this fraction of the way (0.8)")
    add("--sampler", metavar="NAME", help="update rule; `ldm samplers` lists them (default: the published one)")
    add("--steps", type=int, default=50, metavar="N", help="steps of the sampler (50)")
    add(
        "--guidance", type=float, metavar="W", help="scale of classifier-free guidance; 1: none (7.5; without words: 1)"
    )
    add("--image-guidance", type=float, default=1.5, metavar="W", help="of the picture, for InstructPix2Pix (1.5)")
    add("--rescale", type=float, default=0.0, metavar="R", help="pull the guided spread back, in [0, 1] (0)")
    add("--seed", type=int, default=0, metavar="S", help="(0)")
    add("--latents", metavar="F.npy", help="initial noise f32[N or 1, h, w, C] of unit variance")
    add("--keep-latents", action="store_true", help="write latents.npy: what the autoencoder decodes")
    add("--size", metavar="HxW", help="pixels (default: what the network was trained for)")
    add("--num", type=int, metavar="N", help="how many images; prompts are repeated in order (default: one a prompt)")
    add("--batch-size", type=int, default=4, metavar="B", help="images at a time; changes no image (4)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute and weights (float32)")
    add("--offload", action="store_true", help="text encoder, denoiser and decoder on the device one at a time")
    add("--tile", type=int, metavar="P", help="decode in tiles of P pixels, for pictures that do not fit into memory")
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
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{flag}={path}: not a picture") from None


def array(flag: str, path: str) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{flag}={path}: not an .npy file of numbers ({error})") from None


def check(args: argparse.Namespace) -> None:
    """What can be wrong with the flags by themselves, said before a minute is spent on loading."""
    from ldm_jax.diffusion.samplers import SAMPLERS

    if args.sampler is not None and args.sampler not in SAMPLERS:
        raise ValueError(f"--sampler={args.sampler} is unknown; there are {', '.join(sorted(SAMPLERS))}")
    for flag, value in (("--steps", args.steps), ("--num", args.num), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag}={value}; expected at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed={args.seed}; expected 0 or more")
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
    if args.refiner and args.init_image:
        raise ValueError("--refiner goes with prompts alone, not with --init-image")


def draw(pipeline: Any, refiner: Any, args: argparse.Namespace, count: int, told: list[str]) -> Any:
    """f32[N, h, w, C] latents, or pictures where the pipeline has no autoencoder or interpolates."""
    shared = {
        "steps": args.steps,
        "sampler": args.sampler,
        "size": size_of(args.size),
        "batch_size": args.batch_size,
        "quiet": args.quiet,
    }
    one = shared | {
        "guidance": args.guidance,
        "seed": args.seed,
        "latents": None if args.latents is None else array("--latents", args.latents),
        "decode": False,
    }
    if not pipeline.text:
        labels = [word for word in args.label.split(",") if word]
        if bad := [word for word in labels if not word.isdigit()]:
            raise ValueError(f"--label={bad[0]}; expected a number")
        return pipeline.draw(count, [int(word) for word in labels] or None, **one)
    if args.to_prompt is not None or args.to_seed is not None:
        return pipeline.interpolate(
            (told[0], told[0] if args.to_prompt is None else args.to_prompt),
            (args.seed, args.seed if args.to_seed is None else args.to_seed),
            num=count,
            negative=args.negative,
            guidance=args.guidance,
            decode=False,
            **shared,
        )
    told = {"prompts": told, "negative": args.negative}
    one["rescale"] = args.rescale
    if not args.init_image:
        if refiner is None:
            return pipeline.text_to_image(**told, **one)
        z = pipeline.text_to_image(**told, **one, end=args.handover)
        one |= {"latents": None, "size": None}
        return refiner.image_to_image(images=z, start=args.handover, **told, **one)
    images = [picture("--init-image", path) for path in args.init_image]
    if args.vary is not None:
        one = {key: value for key, value in one.items() if key not in ("latents", "sampler")}
        return pipeline.vary(images=images, source=args.vary, sampler=args.sampler or "ddim", num=count, **told, **one)
    if args.mask is not None:
        mask = picture("--mask", args.mask)
        return pipeline.inpaint(images=images, masks=mask, strength=args.strength or 1.0, **told, **one)
    if "Pix2Pix" in pipeline.name:
        return pipeline.edit(images=images, image_guidance=args.image_guidance, **told, **one)
    if args.depth is not None:
        path = args.depth
        one["depth"] = array("--depth", path) if path.endswith(".npy") else depth_of(path)
    return pipeline.image_to_image(
        images=images, strength=0.8 if args.strength is None else args.strength, **told, **one
    )


def depth_of(path: str) -> Any:
    import numpy as np

    return np.asarray(picture("--depth", path).convert("L"), np.float32)[None]


def run(args: argparse.Namespace, rest: list[str]) -> int:
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ldm_jax import pipelines
    from ldm_jax.data import grid

    check(args)
    options = {"dtype": args.dtype, "offload": args.offload}
    pipeline = pipelines.load(args.model, tokenizer=args.tokenizer, prediction=args.prediction, **options)
    refiner = pipelines.load(args.refiner, **options) if args.refiner else None
    if pipeline.text and not args.prompt:
        raise ValueError(f"--prompt: {pipeline.name} needs one")
    if not pipeline.text and (args.prompt or args.init_image):
        raise ValueError(f"{pipeline.name} takes neither prompts nor pictures")
    moving = args.to_prompt is not None or args.to_seed is not None
    count = args.num or (8 if moving else max(len(args.prompt), len(args.init_image), 1))
    told = [args.prompt[i % len(args.prompt)] for i in range(count)] if pipeline.text else []
    if args.guidance is None:
        args.guidance = 7.5 if pipeline.text else 1.0
    z = draw(pipeline, refiner, args, count, told[:1] if moving else told)
    images = pipelines.pictures(refiner or pipeline, z, tile=args.tile)
    images = np.round(images * 255).astype(np.uint8)

    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()]
    first = max(taken, default=-1) + 1
    settings = {k: v for k, v in vars(args).items() if v not in (None, [], "") and k not in ("out", "quiet", "prompt")}
    settings["sampler"] = args.sampler or pipeline.schedule.sampler
    for i, image in enumerate(images):
        info = PngInfo()
        if told:
            info.add_text("prompt", told[0] if moving else told[i], zip=False)
        info.add_text("seed", str(args.seed))
        info.add_text("settings", json.dumps(settings | {"index": i}))
        Image.fromarray(image).save(out / f"{first + i:06d}.png", pnginfo=info)
    if args.keep_latents:
        np.save(out / "latents.npy", z)
    labels = None if moving or not told else told
    grid.save(out / "grid.png", images[:100], labels=labels[:100] if labels else None)
    print(f"{len(images)} images in {out} ({first:06d}.png to {first + len(images) - 1:06d}.png, grid.png)")
    return 0
