"""Write a model in another form: a folder that diffusers loads, one file in the LDM layout, or weights to train from.

  ldm convert sd15.ckpt sd15 --tokenizer=clip             one file -> a pipeline's folder, with the tokenizer that a file lacks
  ldm convert sd15 sd15.safetensors --to=single --dtype=float16
  ldm convert sd15/unet unet-bf16 --dtype=bfloat16        a network's folder
  ldm convert runs/dit dit --step=20000 --ema=none        a run of `ldm train` -> the pipeline of diffusers' that draws the same
  ldm convert runs/dit vae --component=first_stage        one of its networks
  ldm convert sd15/vae start --to=orbax                   then: ldm train --config.init_from.workdir=start

A run becomes a pipeline where diffusers has one: DiTPipeline for a DiT of classes in latents, DDIMPipeline or DDPMPipeline for a
U-Net in pixels, LDMPipeline for one in latents. Its autoencoder is written with the whitening of its latents in it, scaling_factor 1;
a VQModel, which has no place for it, and an AutoencoderTiny, whose latents are white, as they are; a published one bit for bit as it
was.
--to=orbax keeps U-Nets, DiTs and autoencoders, whatever their options. OUT must be new, and is there whole or not at all.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

FORMS = ("hf", "single", "orbax")
COMPONENTS = ("denoiser", "first_stage")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="IN", help="a run, a pipeline's or a network's folder, a single file, or hub:OWNER/NAME")
    add("out", metavar="OUT", help="what is written; must not exist")
    add("--to", default="hf", metavar="FORM", help="hf: folders of diffusers' (default); single: one file; orbax")
    add("--dtype", metavar="D", help="float32, bfloat16 or float16; default: as they are")
    add("--step", type=int, metavar="N", help="of a run: which checkpoint; default: the newest")
    add("--ema", metavar="K", help="of a run: which average, its half-life in images; 'none': the raw parameters")
    add("--component", metavar="C", help="of a run: denoiser or first_stage, that network alone")
    add("--tokenizer", metavar="DIR", help="of a single file: CLIP's vocabulary, a folder, which it lacks")
    add("--prediction", metavar="P", help="of a single file: epsilon or v_prediction, where it cannot tell")
    add(
        "--scaling-factor",
        type=float,
        metavar="F",
        help="of a single file: its latents' scale, where it is an autoencoder alone (0.18215; SDXL's: 0.13025)",
    )


def check(args: argparse.Namespace, source: pathlib.Path, out: pathlib.Path, run: bool) -> None:
    """What is wrong with the words themselves, said before anything is read."""
    for flag, choices in (("to", FORMS), ("component", COMPONENTS), ("dtype", DTYPES)):
        value = getattr(args, flag)
        if value is not None and value not in choices:
            raise ValueError(f"--{flag}={value}; expected {', '.join(choices)}")
    if args.scaling_factor is not None and not 0 < args.scaling_factor < float("inf"):
        raise ValueError(f"--scaling-factor={args.scaling_factor}; expected a finite number above 0")
    if not source.exists():
        raise ValueError(f"{source}: no such folder or file")
    if os.path.lexists(out):
        raise ValueError(f"{out} exists; nothing is overwritten: take another name")
    if (file := next((parent for parent in out.parents if parent.exists()), out.parent)).is_file():
        raise ValueError(f"OUT is {out}, and {file} is a file; expected a folder to write in")
    if (args.to == "single") != (out.suffix == ".safetensors"):
        expected = "a file's name that ends in .safetensors" if args.to == "single" else "the name of a folder"
        raise ValueError(f"--to={args.to}: OUT is {out}; expected {expected}")
    for flag in ("tokenizer", "prediction", "scaling_factor") if run else ("step", "ema", "component"):
        if getattr(args, flag) is not None:
            what = "a single file" if run else "a run of `ldm train`"
            raise ValueError(f"--{flag.replace('_', '-')}={getattr(args, flag)} is for {what}, and {source} is none")


def is_run(path: pathlib.Path) -> bool:
    """Whether `ldm train` made it: its config.json names a task, that of a published network its class."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "task" in config


@contextlib.contextmanager
def made(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """The path to write to, which becomes `out` when the block ends well and is removed when it does not."""
    new = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder / out.name
        if os.path.lexists(out):
            raise ValueError(f"{out} exists by now; nothing is overwritten")
        os.rename(folder / out.name, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new:
            with contextlib.suppress(OSError):  # it holds what was written
                parent.rmdir()


def cast(params: Any, dtype: str | None) -> Any:
    """The tree as numpy arrays of `dtype` (None: as they are)."""
    import jax
    import numpy as np

    from ldm_jax.pipelines import convert

    def leaf(path: Any, x: Any) -> Any:
        x = np.asarray(x)
        return x if dtype is None else convert.narrowed(jax.tree_util.keystr(path, simple=True), x, np.dtype(dtype))

    return jax.tree_util.tree_map_with_path(leaf, params)


def restore(args: argparse.Namespace, workdir: pathlib.Path) -> tuple[Any, Any]:
    """(the restored diffusion run or None, its first stage or None) of any run that holds one of them."""
    from ldm_jax.training import blocks, experiment, open_stage, restore

    parsed = experiment.of_run(workdir)
    if blocks.kind_of(parsed).model is not None:
        run = restore.restore(workdir, args.step, args.ema)
        return run, run.model.stage
    if args.ema is not None:
        raise ValueError(
            f"--ema={args.ema}: {workdir} is a first stage, which is its first average wherever it is used"
        )
    if args.component == "denoiser":
        raise ValueError(f"--component=denoiser: {workdir} holds a run of the task {parsed.task.name!r}")
    return None, open_stage.load_any(workdir, args.step)


def export_run(args: argparse.Namespace, workdir: pathlib.Path, target: pathlib.Path) -> None:
    """A run, or one of its networks, as a folder of diffusers'."""
    from ldm_jax.models.autoencoder_kl import AutoencoderKL
    from ldm_jax.pipelines import export
    from ldm_jax.training import experiment, published

    run, stage = restore(args, workdir)
    first, facts, alone = None, None, args.component == "first_stage"
    if stage is not None:
        module, params = stage.network, stage.params
        as_published = published.says(stage) if alone or run is None else published.is_plain(stage)
        if as_published:
            facts = stage.published.config
        elif isinstance(module, AutoencoderKL):
            module, params = export.whitened(module, params, stage.mean, stage.std)
        first = module, cast(params, args.dtype)
    if run is None or alone:
        if first is None:
            raise ValueError(f"--component=first_stage: {workdir} is a run in pixels")
        of = experiment.of_run(workdir) if run is None else run.experiment
        export.network(target, *first, of.input.resolution, facts)
        return
    side, denoiser = run.model.shape[0], (run.model.denoiser, cast(run.params["denoiser"], args.dtype))
    if args.component == "denoiser":
        export.network(target, *denoiser, side)
        return
    if others := [name for name in run.model.conditioning.names if name != "label"]:
        what = "a text encoder trained here" if others[0] == "text" else "such a run"
        raise ValueError(
            f"config.condition.{others[0]} is set: no pipeline of diffusers takes {what}; "
            + " or ".join(f"--component={name}" for name in COMPONENTS)
            + " writes one network"
        )
    if first is not None and not isinstance(first[0], AutoencoderKL) and not as_published:
        raise ValueError(
            f"no pipeline of diffusers' decodes the whitened latents of a {type(first[0]).__name__}; "
            + " or ".join(f"--component={name}" for name in COMPONENTS)
            + " writes one network"
        )
    spoken = run.experiment.record["process"], run.model.prediction, run.model.learned_variance
    export.pipeline(target, denoiser, side, *spoken, first, run.dataset["class_names"], facts)


def export_start(args: argparse.Namespace, source: pathlib.Path, target: pathlib.Path) -> None:
    """A network of what --to=orbax wrote, as the folder of diffusers' that it came from."""
    from ldm_jax import weights
    from ldm_jax.models.autoencoder_kl import AutoencoderKL
    from ldm_jax.pipelines import export
    from ldm_jax.runs import checkpoint
    from ldm_jax.training import published

    if args.ema is not None:
        raise ValueError(f"--ema={args.ema}: {source} holds parameters alone, without averages")
    configs = published.networks(source)
    name = {"denoiser": "denoiser", "first_stage": "autoencoder"}.get(args.component)
    if name is None and len(configs) == 1:
        name = next(iter(configs))
    if name not in configs:
        names = ", ".join(f"--component={'first_stage' if name == 'autoencoder' else name}" for name in configs)
        raise ValueError(f"{source} holds {', '.join(configs) or 'no network of a published class'}; expected {names}")
    params = checkpoint.restore_params(source, checkpoint.pick(source, args.step))[name]
    module, facts = weights.module_of(configs[name])[1], configs[name]
    if name == "autoencoder" and isinstance(module, AutoencoderKL):
        stage = published.load(published.find(source), 64)
        if not published.says(stage):  # a run's, whose statistics were measured
            (module, params), facts = export.whitened(module, params, stage.mean, stage.std), {}
    weights.save(target, module, cast(params, args.dtype), facts=facts)


def parameters(
    args: argparse.Namespace, source: pathlib.Path, run: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of the networks that can be trained here, as `ldm train` calls them: ({name: parameters}, {name: config.json}, whitening).

    A network of a run has a config.json where a class of diffusers' computes it; the whitening {'mean', 'std'} is that of a run's first
    stage, {} elsewhere.
    """
    import numpy as np

    from ldm_jax import weights
    from ldm_jax.models.autoencoder_kl import AutoencoderKL
    from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
    from ldm_jax.models.dit import DiT
    from ldm_jax.models.unet import UNet
    from ldm_jax.models.vq import VQModel
    from ldm_jax.pipelines import convert

    if run:
        restored, stage = restore(args, source)
        params = {} if restored is None else dict(restored.params)
        modules = {} if restored is None else {"denoiser": restored.model.denoiser}
        whitening = {}
        if stage is not None:
            params["autoencoder"], modules["autoencoder"] = stage.params, stage.network
            if np.any(stage.mean) or np.any(stage.std != 1):
                whitening = {name: np.asarray(getattr(stage, name), float).tolist() for name in ("mean", "std")}
        if args.component is not None:
            name = {"denoiser": "denoiser", "first_stage": "autoencoder"}[args.component]
            if name not in params:
                raise ValueError(f"--component={args.component}: {source} is a run in pixels")
            params = {name: params[name]}
        configs = {}
        for name in params.keys() & modules.keys():
            with contextlib.suppress(ValueError):  # no class of diffusers computes it
                configs[name] = published_config(modules[name])
        return cast(params, args.dtype), configs, whitening if "autoencoder" in params else {}
    names = dict.fromkeys((AutoencoderKL, AutoencoderTiny, VQModel), "autoencoder") | {
        UNet: "denoiser",
        DiT: "denoiser",
    }
    params, configs = {}, {}
    model = convert.read(source, args.tokenizer, args.prediction, args.scaling_factor)
    model = convert.cast(model, args.dtype) if args.dtype else model
    for config, tensors in model.networks.values():
        if weights.class_named(config) not in weights.FORMATS:  # a safety checker
            continue
        module = weights.module_of(config)[1]
        if type(module) in names:
            name = names[type(module)]
            params[name] = weights.from_tensors(module, tensors, place=lambda path, value: value)
            configs[name] = dict(config)
    if not params:
        classes = [str(weights.class_named(config)) for config, _ in model.networks.values()]
        raise ValueError(f"--to=orbax: {source} holds {', '.join(classes)}; expected a U-Net, a DiT or an autoencoder")
    return params, configs, {}


def published_config(module: Any) -> dict[str, Any]:
    """The config.json of our module's published class. ValueError where none computes it."""
    from ldm_jax import weights

    name = weights.class_of(module)
    return {"_class_name": name, **weights.FORMATS[name].config(module)}


def write_start(
    target: pathlib.Path,
    params: dict[str, Any],
    source: pathlib.Path,
    configs: Mapping[str, Any] = MappingProxyType({}),
    whitening: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """What config.init_from.workdir reads of a run: parameters at step 0, no averages, no task to go on with; and, for
    config.first_stage.workdir, what networks these are."""
    import orbax.checkpoint as ocp

    from ldm_jax.runs import checkpoint
    from ldm_jax.training import published

    step = checkpoint.folder(target) / "0"
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / "state", {"params": params})
    checkpoint.write_manifest(step)
    config = {
        "task": {"name": published.WEIGHTS},
        "ema": {"half_lives": []},
        "converted_from": str(source.absolute()),
        "networks": dict(configs),
    }
    config |= {"whitening": dict(whitening)} if whitening else {}
    checkpoint.write_text(target / "config.json", json.dumps(config, indent=1) + "\n")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax import weights
    from ldm_jax.pipelines import convert
    from ldm_jax.training import published
    from ldm_jax.weights import hub

    source, out = hub.resolve(args.source), pathlib.Path(args.out).absolute()
    trained = is_run(source)
    check(args, source, out, trained)
    if args.to == "orbax" and trained and published.is_start(source):
        raise ValueError(f"--to=orbax: {source} is what that wrote already")
    with made(out) as target:
        if args.to == "orbax":
            params, configs, whitening = parameters(args, source, trained)
            write_start(target, params, source, configs, whitening)
            more = f" or --config.first_stage.workdir={out}" if "autoencoder" in configs else ""
            print(f"{out}: {', '.join(params)}, for --config.init_from.workdir={out}{more}")
            return 0
        if trained:
            folder = target if args.to == "hf" else target.with_name("folder")
            (export_start if published.is_start(source) else export_run)(args, source, folder)
            model = convert.read(folder)
        else:
            model = convert.read(source, args.tokenizer, args.prediction, args.scaling_factor)
            model = convert.cast(model, args.dtype) if args.dtype else model
        if args.to == "single":
            scheduler = convert.write_file(target, model)
            taken = f"; read with {scheduler['_class_name']}, {scheduler['prediction_type']}" if scheduler else ""
            print(f"{out}: the LDM layout{taken}")
            return 0
        if not trained:
            convert.write_folder(target, model)
        name = model.index["_class_name"] if model.index else weights.class_named(model.networks[""][0])
        config = model.networks.get("", ({},))[0]
        if source.is_file() and args.scaling_factor is None and "scaling_factor" in config:
            name += f", scaling_factor {config['scaling_factor']}: a file does not say; --scaling-factor tells another"
        print(f"{out}: {name}")
    return 0
