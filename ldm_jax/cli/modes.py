"""The modes of `ldm generate`: which flags each reads, its defaults, and how it draws.

A new mode is one row of MODES and one condition in `mode_of`.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm_jax.cli import drawing

if TYPE_CHECKING:
    import numpy as np

    from ldm_jax.pipelines import Pipeline, Request


class Inputs(NamedTuple):
    """What the images are drawn from, read from files: each list goes round where there are more images."""

    prompts: list[str]
    labels: list[int]
    images: list[Any]
    latents: "list[np.ndarray]"
    mask: Any = None
    depth: Any = None

    def rows(self, name: str, rows: range) -> list:
        """The entries of one list that these images have."""
        values = getattr(self, name)
        return [values[i % len(values)] for i in rows]


class Mode(NamedTuple):
    """way: a name of pipelines.pipeline.WAYS. reads: flags besides those that every mode reads. fields: (args, inputs) -> the fields of
    Request of this mode alone. defaults: of flags that are missing."""

    way: str
    reads: tuple[str, ...]
    fields: Callable[[argparse.Namespace, Inputs], dict[str, Any]] = lambda args, inputs: {}
    defaults: Mapping[str, Any] = {}


def _between(args: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    prompts = None
    if inputs.prompts:
        (prompt,) = inputs.prompts
        prompts = (prompt, prompt if args.to_prompt is None else args.to_prompt)
    return {"prompts": prompts, "seeds": (args.seed, args.seed if args.to_seed is None else args.to_seed), "first": 0}


def _depth(args: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    return {"strength": args.strength} | ({} if inputs.depth is None else {"depth": inputs.depth})


NOISE = ("latents",)
MODES: dict[str, Mode] = {
    "classes": Mode("draw", NOISE),
    "interpolation": Mode("interpolate", ("to_prompt", "to_seed"), _between),
    "text": Mode("text_to_image", (*NOISE, "rescale")),
    "refined text": Mode(
        "text_to_image",
        (*NOISE, "rescale", "refiner", "handover"),
        lambda args, inputs: {"end": args.handover},
        {"handover": 0.8},
    ),
    "variation": Mode(
        "vary",
        ("init_image", "vary", "rescale"),
        lambda args, inputs: {"source": args.vary},
        {"sampler": "ddim"},
    ),
    "inpainting": Mode(
        "inpaint",
        (*NOISE, "init_image", "mask", "strength", "rescale"),
        lambda args, inputs: {"masks": inputs.mask, "strength": args.strength},
        {"strength": 1.0},
    ),
    "instruction": Mode(
        "edit",
        (*NOISE, "init_image", "image_guidance", "rescale"),
        lambda args, inputs: {"image_guidance": args.image_guidance},
        {"image_guidance": 1.5},
    ),
    "picture as condition": Mode("from_picture", (*NOISE, "init_image", "rescale")),
    "picture": Mode(
        "image_to_image", (*NOISE, "init_image", "strength", "depth", "rescale"), _depth, {"strength": 0.8}
    ),
}
# Flags of guidance: all do nothing where there is none.
OF_GUIDANCE = ("negative", "rescale", "guidance_method", "guidance_schedule", "guidance_interval")


def mode_of(args: argparse.Namespace, pipeline: "Pipeline") -> str:
    """The mode that flags and model ask for. ValueError for a flag that would do nothing there."""
    takes = pipeline.takes
    if args.to_prompt is not None or args.to_seed is not None:
        mode = "interpolation"
    elif args.init_image and args.vary is not None:
        mode = "variation"
    elif args.init_image and args.mask is not None:
        mode = "inpainting"
    elif args.init_image and takes.image and args.strength is None:
        mode = "picture as condition"
    elif args.init_image:
        mode = "instruction" if pipeline.kind.instructs else "picture"
    elif takes.prompts:
        mode = "refined text" if args.refiner else "text"
    else:
        mode = "classes"
    needed = [
        flag for flag, needs in (("init_image", takes.image), ("mask", takes.mask)) if needs and not getattr(args, flag)
    ]
    if needed:
        raise ValueError(
            f"{pipeline.name} needs {' and '.join('--' + flag.replace('_', '-') for flag in needed)}: it is conditioned on "
            "what they show; `ldm sample` takes this from the data"
        )
    reads = {*MODES[mode].reads, *(["negative"] if takes.prompts else [])}
    reads |= {"label"} if takes.classes is not None or mode == "classes" else set()
    flags = {flag for row in MODES.values() for flag in row.reads} | {"label", "negative"}
    for flag in sorted(flags - reads):
        if getattr(args, flag) not in (None, [], ""):
            raise ValueError(f"--{flag.replace('_', '-')} does nothing for {mode} by {pipeline.name}")
    if args.prompt and not takes.prompts:
        raise ValueError(f"--prompt: {pipeline.name} takes none")
    if takes.prompts and not args.prompt:
        raise ValueError(f"--prompt: {pipeline.name} needs one")
    if args.to_prompt is not None and not takes.prompts:
        raise ValueError(f"--to-prompt: {pipeline.name} takes no prompts")
    return mode


def unguided(args: argparse.Namespace, pipeline: "Pipeline") -> str | None:
    """Why there is no guidance, None where there is."""
    if pipeline.takes.scale:
        return f"{pipeline.name}, whose network takes its scale of guidance"
    settings = pipeline.settings(how(args))
    if args.guidance is not None and not pipeline.guided(settings):
        return f"--guidance={settings.guidance:g}: {pipeline.unguided}"
    if args.image_guidance is not None and args.image_guidance < 1:
        return f"--image-guidance={args.image_guidance:g}: below 1 means unguided"
    return None


def check_guided(args: argparse.Namespace, pipeline: "Pipeline") -> None:
    """ValueError for a flag of guidance where there is none."""
    if (why := unguided(args, pipeline)) is None:
        return
    for flag in OF_GUIDANCE:
        if getattr(args, flag) not in (None, 0.0):
            raise ValueError(f"--{flag.replace('_', '-')} does nothing with {why}")


def how(args: argparse.Namespace) -> "Request":
    """The request of the flags that say how to draw."""
    from ldm_jax.pipelines import Request

    fields = drawing.chosen(args)
    fields["sampler"] = fields.pop("name", None)
    fields |= {} if args.rescale is None else {"rescale": args.rescale}
    return Request(**fields)


def request_of(args: argparse.Namespace, mode: str, inputs: Inputs, rows: range) -> "Request":
    """What is asked for images `rows`, in a mode whose defaults are filled in; latents and not pictures come out."""
    import numpy as np

    shared = {
        "size": size_of(args.size),
        "num": len(rows),
        "negative": args.negative,
        "labels": inputs.labels or None,
        "seed": args.seed,
        "first": rows[0],
        "batch_size": args.batch_size,
        "quiet": args.quiet,
        "decode": False,
    }
    if inputs.prompts:
        shared["prompts"] = inputs.rows("prompts", rows)
    if inputs.latents:
        shared["latents"] = np.stack(inputs.rows("latents", rows))
    if inputs.images:
        # One picture for all is encoded once.
        shared["images"] = inputs.images if len(inputs.images) == 1 else inputs.rows("images", rows)
    return how(args)._replace(**(shared | MODES[mode].fields(args, inputs)))


def draw(
    pipeline: "Pipeline", refiner: "Pipeline | None", args: argparse.Namespace, mode: str, rows: range, inputs: Inputs
) -> "np.ndarray":
    """f32[len(rows), ...]: latents of these images, or what models of pixels draw, as pipelines.pictures takes them."""
    from ldm_jax.pipelines.pipeline import run

    request = request_of(args, mode, inputs, rows)
    z = run(pipeline, MODES[mode].way, request)
    if refiner is None:
        return z
    request = request._replace(images=z, start=args.handover, end=1.0, latents=None, size=None)
    return run(refiner, "image_to_image", request)


def size_of(text: str | None) -> tuple[int, int] | None:
    """'512x768' -> (512, 768), height first; '512' -> (512, 512)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() for part in parts):
        raise ValueError(f"--size={text}; expected HxW in pixels, as 512x768")
    return int(parts[0]), int(parts[-1])
