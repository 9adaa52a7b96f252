"""Whole models in one file, in the names of the programs that trained them <-> a network at a time, as diffusers and transformers do.

    kind = identify(shapes);   components = split(state, kind);   state = join(components, kind)

FAMILIES lists the families of such files. Each family is defined in a file of this folder: how a file of the family is recognised,
which networks it holds and under which names, and how their config.json follows from the shapes of the tensors. This reads no tensor.
"""

import sys
from collections.abc import Mapping
from typing import Any

from ldm_jax.weights.layout import Tensor, listed
from ldm_jax.weights.single_file import latent_diffusion, sdxl, stable_diffusion, vae
from ldm_jax.weights.single_file.family import PREDICTIONS, Family, Kind, Part
from ldm_jax.weights.single_file.leftovers import UNUSED, left_out
from ldm_jax.weights.single_file.measure import Shapes, below
from ldm_jax.weights.single_file.pairs import find

FAMILIES: dict[str, Family] = {
    "sd1": stable_diffusion.SD1,
    "sd2": stable_diffusion.SD2,
    "sdxl": sdxl.BASE,
    "sdxl_refiner": sdxl.REFINER,
    "vae": vae.VAE,
}
KINDS: dict[str, Kind] = {name: kind for family in FAMILIES.values() for name, kind in family.kinds.items()}


def identify(shapes: Shapes) -> str:
    """The kind (of KINDS) of the file whose tensors have these names and shapes.

    Raises ValueError listing the first names if no family has such tensors, and for a U-Net of latent diffusion that no kind has.
    """
    for family in FAMILIES.values():
        if (kind := family.recognises(shapes)) is not None:
            return kind
    if (misfit := latent_diffusion.misfit(shapes, FAMILIES.values())) is not None:
        raise ValueError(f"single file: {misfit}")
    marks = " or ".join(dict.fromkeys(family.mark for family in FAMILIES.values()))
    raise ValueError(f"single file: no {marks} among its {len(shapes)} tensors: {listed(shapes)}")


def parts(kind: str) -> Mapping[str, Part]:
    """component -> where it lies in a file of this kind."""
    return FAMILIES[KINDS[kind].family].parts


def kind_of(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The kind of file into which networks with these config.json, by component, are written; None: there is no such kind."""
    return next((kind for family in FAMILIES.values() if (kind := family.suits(configs)) is not None), None)


def configs(
    shapes: Shapes,
    kind: str | None = None,
    *,
    prediction: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """component -> its config.json as in the published folder: for the scheduler, and each of unet, vae, text_encoder(_2) in the file.

    kind        a name in KINDS; None: that of `identify`. For an autoencoder alone the kind decides the scale of the latents
    prediction  'epsilon', 'v_prediction' or 'sample'. A file does not say it, but some SDXL models have the marks v_pred and ztsnr.
                None: as published for the kind; for SD 2 the model of 768 pixels, which predicts v
    options     component -> further options that do not follow from shapes (heads, groups of norms, scaling_factor); they replace the
                published ones

    Raises ValueError as `identify` does; for an unknown kind or prediction, and an unknown component in `options`; for a U-Net that
    reads another number of channels than the kind; for levels that a config of diffusers cannot express; and for latents that do not
    have 4 channels, without a scaling_factor.
    """
    kind = identify(shapes) if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"single file: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"single file: prediction is {prediction!r}, expected one of {', '.join(PREDICTIONS)}")
    family = FAMILIES[KINDS[kind].family]
    prediction = prediction or ("v_prediction" if "v_pred" in shapes else KINDS[kind].prediction)
    pixels = family.size(kind, prediction)
    components: dict[str, dict[str, Any]] = {}
    for component, part in family.parts.items():
        if (prefix := part.prefix(shapes)) is not None:
            components[component] = part.config(below(prefix, shapes), pixels)
    if not components:
        raise ValueError(f"single file: no network of a {kind} among its {len(shapes)} tensors: {listed(shapes)}")
    if "unet" in components and components["unet"]["in_channels"] != KINDS[kind].channels:
        raise ValueError(
            f"single file: the U-Net reads {components['unet']['in_channels']} channels, that of a {kind} reads "
            f"{KINDS[kind].channels}"
        )
    if (schedule := family.scheduler(shapes, KINDS[kind], prediction)) is not None:
        components["scheduler"] = schedule
    for component, changes in (options or {}).items():
        if component not in components:
            raise ValueError(f"single file: options for {component!r}, expected one of {', '.join(components)}")
        components[component] |= changes
    if "vae" in components and "scaling_factor" not in components["vae"]:
        raise ValueError(
            f"single file: no scale is known for latents of {components['vae']['latent_channels']} channels, expected "
            "options={'vae': {'scaling_factor': ...}}"
        )
    return components


def split(
    state: Mapping[str, Tensor],
    kind: str | None = None,
    *,
    prediction: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """The tensors of a single file -> {component: (its config.json, its tensors under the names of a Hugging Face folder)}.

    The arguments and the components are those of `configs`; the scheduler has no tensors. No tensor is read: one that differs in layout
    is made when it is read. Missing tensors are not reported here but by `layout.read`. Tensors that no network reads (LEFT_OUT) are
    left out, and a line on stderr says so. Raises ValueError as `configs` does, and for tensors that belong to no network of the
    kind, listing the first ten.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    kind = identify(shapes) if kind is None else kind
    described = configs(shapes, kind, prediction=prediction, options=options)
    components: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    used: set[str] = set()
    for component, config in described.items():
        tensors: dict[str, Tensor] = {}
        components[component] = (config, tensors)
        if component == "scheduler":
            continue
        part = parts(kind)[component]
        prefix = part.prefix(state) or ""
        rows = {pair.ldm: pair for pair in part.table(config)}
        for name, tensor in below(prefix, state).items():
            pair, rest = find(rows, part.spelt(name))
            if pair is None:
                continue
            used.add(prefix + name)
            made = pair.storage.to_folder(prefix + name, tensor, len(pair.names))
            for hf, value in zip(pair.names, made, strict=True):
                if hf + rest in tensors:
                    raise ValueError(f"single file: {prefix + name} and another name for it are both in the file")
                tensors[hf + rest] = value
    left = [name for name in state if name not in used]
    if foreign := [name for name in left if not UNUSED.fullmatch(name)]:
        raise ValueError(f"single file: {len(foreign)} tensors are of no network of a {kind}: {listed(foreign)}")
    if said := left_out(left):
        print(f"note: single file: no network reads {said}: left out", file=sys.stderr)
    return components


def join(components: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]], kind: str) -> dict[str, Tensor]:
    """The inverse of `split`: {component: (config.json, tensors under the names of a folder)} -> the tensors of a single file.

    The names of text encoders may lack text_model., as in transformers 5. The file does not hold the scheduler, nor tensors that no
    network needs (UNUSED). An autoencoder alone (kind 'vae') is written without a prefix. Tensors are made when they are read.

    Raises ValueError for a component that the kind does not have; for tensors that its network does not have, listing the first ten;
    and where one of several tensors that are joined is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"single file: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    state: dict[str, Tensor] = {}
    for component, (config, tensors) in components.items():
        if component == "scheduler":
            continue
        if component not in parts(kind):
            raise ValueError(f"single file: a {kind} has no {component}, expected {', '.join(parts(kind))}")
        part = parts(kind)[component]
        tensors = {part.filed(name): tensor for name, tensor in tensors.items()}
        table = part.table(config)
        rows = {name: pair for pair in table for name in pair.names}
        left = []
        for name in tensors:
            pair, rest = find(rows, name)
            if pair is None:
                if not UNUSED.fullmatch(name):
                    left.append(name)
                continue
            names = [hf + rest for hf in pair.names]
            if missing := [hf for hf in names if hf not in tensors]:
                raise ValueError(f"single file: {component} lacks {', '.join(missing)}, which is joined with {name}")
            state[part.prefixes[0] + pair.ldm + rest] = pair.storage.to_file([tensors[hf] for hf in names])
        if left:
            raise ValueError(f"single file: {len(left)} tensors are not of {component}: {listed(left)}")
    return state
