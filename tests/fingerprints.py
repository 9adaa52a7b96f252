"""Fingerprints of behaviour: the sha256 of what small runs compute and of what small pipelines draw, to hold a rebuilding against.

    python -m tests.fingerprints record            # before the first move: writes build/fingerprints.json
    python -m tests.fingerprints check [WORD ...]  # after each step: names what changed; only rows whose name holds a WORD

Everything goes through the command line, in this process, so that code may move freely. A fingerprint of a run is that of its final
parameters, averages and variables by name; of a drawing, that of the pixels of its pictures; of an evaluation, that of its figures.
They hold on one machine with one set of libraries: floating point differs between machines. The recorded file is therefore not kept
in the repository, and this is no part of the test suite. Rows of real images need LDM_DATA.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("LDM_TRACEBACK", "1")

import numpy as np
from PIL import Image

FILE = pathlib.Path(__file__).parents[1] / "build" / "fingerprints.json"

# After four steps at a warm-up rate the output of a denoiser is still 0 for any input: pictures would not depend on how they are drawn.
FAST = ("--config.optimizer.warmup_images=0", "--config.optimizer.learning_rate=0.03", "--config.ema.half_lives=(1,)")

# name: (config, overrides). One for each task and family of networks; those that others start from come first.
RUNS: dict[str, tuple[str, ...]] = {
    "vae": ("configs/quickstart_vae.py:smoke",),
    "vae_adversarial": ("configs/imagenet256_vae.py:smoke",),
    "vq": ("configs/imagenet256_vq.py:smoke",),
    "vq_average": ("configs/first_stage64.py:emoji,vq,adversarial,smoke",),
    "fsq": ("configs/imagenet256_vq.py:fsq,smoke",),
    "classifier": ("configs/cifar10_classifier.py:smoke",),
    "tiny": ("configs/quickstart_tiny.py:smoke", "--config.first_stage.workdir={vae}"),
    "dit_text": ("configs/quickstart.py:smoke", "--config.first_stage.workdir={vae}", *FAST),
    "dit_accumulated": (
        "configs/quickstart.py:smoke",
        "--config.first_stage.workdir={vae}",
        "--config.train.accumulate=2",
        *FAST,
    ),
    "dit_pixel": ("configs/cifar10_dit_pixel.py:smoke", *FAST),
    "dit_learned_variance": ("configs/imagenet256_dit_xl2.py:smoke", *FAST),
    "unet": ("configs/cifar10_ldm_unet.py:smoke", *FAST),
}

# name: (run, flags of `ldm sample`).
SAMPLES: dict[str, tuple[str, ...]] = {
    "sample_text": ("dit_text", "--num=3", "--text=a red circle", "--text=a small blue square"),
    "sample_sde": ("dit_text", "--num=2", "--text=a red circle", "--sampler=dpmpp_2m_sde", "--steps=4", "--seed=7"),
    "sample_apg": ("dit_text", "--num=2", "--text=a red circle", "--guidance=3", "--guidance-method=apg:eta=0"),
    "sample_schedule": ("dit_text", "--num=2", "--guidance=3", "--guidance-schedule=linear", "--grid=quadratic"),
    "sample_raw": ("dit_text", "--num=2", "--ema=none"),
    "sample_label": ("dit_pixel", "--num=3", "--label=3,1", "--threshold=static"),
    "sample_ddpm": ("dit_learned_variance", "--num=2"),
    "sample_unet": ("unet", "--num=2"),
}

# name: (run, flags of `ldm evaluate`).
EVALUATIONS: dict[str, tuple[str, ...]] = {
    "evaluate_shapes": ("dit_text", "--metrics=shapes", "--num=8"),
    "evaluate_vae": ("vae", "--metrics=psnr,ssim,kl,latents", "--num=16"),
    "evaluate_codebook": ("vq", "--metrics=psnr,codebook", "--num=16"),
    "evaluate_fd": (
        "unet",
        "--metrics=fd,kid,prdc,accuracy,neighbours",
        "--num=24",
        "--features=classifier:{classifier}",
        "--reference=split:val",
    ),
    "evaluate_bits": ("dit_pixel", "--metrics=bits", "--num=4"),
}

# What changes from run to run, or with the place where it lies.
VOLATILE = (
    "commit",
    "machine",
    "picture",
    "seconds",
    "neighbours_classifier",
    "checkpoint",
    "features",
    "features_sha256",
    "reference_sha256",
    "time",
    "workdir",
)

# name: (pipeline of `pipelines`, flags of `ldm generate`).
PICTURES: dict[str, tuple[str, ...]] = {
    "text": ("sd", "--prompt=a red cat", "--negative=blue", "--guidance=4"),
    "text_weighted": ("sd", "--prompt=a (red:1.3) cat", "--guidance=4", "--sampler=dpmpp_2m", "--rescale=0.5"),
    "text_sde": ("ddim", "--prompt=a cat", "--prompt=a dog", "--sampler=euler_ancestral", "--num=3", "--batch-size=2"),
    "text_xl": ("xl", "--prompt=a red cat", "--guidance=4"),
    "lcm": ("lcm", "--prompt=a red cat", "--steps=2"),
    "picture": ("sd", "--prompt=a red cat", "--init-image={picture}", "--strength=0.6"),
    "variation": ("ddim", "--prompt=a red cat", "--vary=a dog", "--init-image={picture}"),
    "inpaint": ("ddim", "--prompt=a red cat", "--init-image={picture}", "--mask={mask}"),
    "inpaint_nine": ("inpaint", "--prompt=a red cat", "--init-image={picture}", "--mask={mask}"),
    "depth": ("depth", "--prompt=a red cat", "--init-image={picture}", "--depth={depth}"),
    "instruct": ("pix2pix", "--prompt=make it red", "--init-image={picture}"),
    "refiner": ("xl", "--prompt=a red cat", "--refiner={refiner}", "--handover=0.6"),
    "interpolation": ("ddim", "--prompt=a red cat", "--to-prompt=a dog", "--to-seed=3", "--num=3"),
    "ddpm": ("ddpm", "--num=2", "--sampler=ddim"),
    "score_sde": ("score_sde", "--num=2"),
    "consistency": ("cm", "--num=2", "--steps=1"),
    "dit": ("dit", "--num=2", "--label=3,1", "--guidance=3"),
    "tiled": ("ddim", "--prompt=a red cat", "--size=32", "--tile=16"),
}


def pipelines(folder: pathlib.Path) -> dict[str, str]:
    """Tiny random pipelines of diffusers and the pictures given to them, as files in `folder`; {name: path}."""
    import diffusers
    import torch

    from tests.pipelines import published as tiny

    euler = diffusers.EulerDiscreteScheduler(**tiny.EULER)
    ddim, pndm = diffusers.DDIMScheduler(**tiny.DDIM), diffusers.PNDMScheduler(**tiny.PNDM)
    xl = {"text_encoder_2": tiny.text_encoder(16, projection=32, act="gelu"), "tokenizer_2": tiny.tokenizer()}
    plain = {k: v for k, v in tiny.sd_parts().items() if k in ("vae", "text_encoder", "tokenizer")}
    torch.manual_seed(0)
    score = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_eps": 1e-6,
        "mid_block_scale_factor": 2**0.5,
        "norm_num_groups": None,
        "time_embedding_type": "fourier",
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    }
    adm = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 8,
        "num_class_embeds": 10,
    }
    ddpm = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    dit = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    tiny.stir(dit)
    for block in dit.transformer_blocks[1:]:  # published ones have one embedding of time and class for all blocks
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    # torch.manual_seed of the parts that tiny.* does not seed by itself is that of the line above: made in this order, always.
    unconditional = {name: tiny.stir(diffusers.UNet2DModel(**o)) for name, o in (("s", score), ("a", adm), ("d", ddpm))}
    made = {
        "sd": diffusers.StableDiffusionPipeline(unet=tiny.unet(), scheduler=pndm, **tiny.sd_parts()),
        "ddim": diffusers.StableDiffusionPipeline(unet=tiny.unet(), scheduler=ddim, **tiny.sd_parts()),
        "inpaint": diffusers.StableDiffusionInpaintPipeline(
            unet=tiny.unet(in_channels=9), scheduler=ddim, **tiny.sd_parts()
        ),
        "pix2pix": diffusers.StableDiffusionInstructPix2PixPipeline(
            unet=tiny.unet(in_channels=8), scheduler=ddim, **tiny.sd_parts()
        ),
        "depth": diffusers.StableDiffusionDepth2ImgPipeline(
            unet=tiny.unet(in_channels=5), scheduler=ddim, depth_estimator=None, feature_extractor=None, **plain
        ),
        "lcm": diffusers.LatentConsistencyModelPipeline(
            unet=tiny.unet(time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler(**tiny.TABLE), **tiny.sd_parts()
        ),
        "xl": diffusers.StableDiffusionXLPipeline(
            unet=tiny.xl_unet(cross_attention_dim=24), scheduler=euler, **plain, **xl
        ),
        "refiner": diffusers.StableDiffusionXLImg2ImgPipeline(
            unet=tiny.xl_unet(72, cross_attention_dim=16),
            scheduler=euler,
            vae=plain["vae"],
            text_encoder=None,
            tokenizer=None,
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            **xl,
        ),
        "ddpm": diffusers.DDPMPipeline(unet=unconditional["d"], scheduler=diffusers.DDPMScheduler()),
        "score_sde": diffusers.ScoreSdeVePipeline(
            unet=unconditional["s"], scheduler=diffusers.ScoreSdeVeScheduler(sigma_max=50.0)
        ),
        "cm": diffusers.ConsistencyModelPipeline(
            unet=tiny.stir(diffusers.UNet2DModel(**{**adm, "num_class_embeds": 10})),
            scheduler=diffusers.CMStochasticIterativeScheduler(),
        ),
        "dit": diffusers.DiTPipeline(transformer=dit, vae=tiny.vae(), scheduler=ddim),
    }
    paths = {}
    for name, pipeline in made.items():
        paths[name] = str(folder / name)
        pipeline.save_pretrained(paths[name])
    pixels = (tiny.picture()[0] * 255).astype(np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 6:16] = 255
    for name, picture in (("picture", pixels), ("mask", mask), ("depth", pixels[..., 0])):
        suffix = "_map" if name == "depth" else ""
        paths[name + suffix] = str(folder / f"{name}{suffix}.png")
        Image.fromarray(picture).save(paths[name + suffix])
    return paths


def ldm(*words: str) -> str:
    """Run `ldm ...` in this process; what it printed. RuntimeError for another exit code than 0."""
    from ldm_jax.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(list(words))
    if code:
        raise RuntimeError(f"ldm {' '.join(words)} ended with {code}")
    return out.getvalue()


def of_arrays(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()[:16]


def of_run(workdir: pathlib.Path) -> str:
    """Of everything in the newest checkpoint's state, read with orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    step = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(step.absolute() / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return of_arrays({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


def of_pictures(folder: pathlib.Path) -> str:
    files = sorted(p for p in folder.glob("*.png") if p.stem.isdigit())
    return of_arrays({p.name: np.asarray(Image.open(p)) for p in files})


def rows(root: pathlib.Path) -> dict[str, Callable[[], str]]:
    """{name: a function that makes the row and returns its fingerprint}, in the order in which they need one another."""
    made, drawn = {name: root / "runs" / name for name in RUNS}, {}
    places = {name: str(path) for name, path in made.items()}

    def train(name: str) -> str:
        spec, *overrides = RUNS[name]
        ldm("train", f"--config={spec}", f"--workdir={made[name]}", "--quiet", *(o.format(**places) for o in overrides))
        return of_run(made[name])

    def sample(name: str) -> str:
        run, *flags = SAMPLES[name]
        ldm("sample", f"--workdir={made[run]}", f"--out={root / name}", "--quiet", *flags)
        return of_pictures(root / name)

    def evaluate(name: str) -> str:
        run, *flags = EVALUATIONS[name]
        said = ldm("evaluate", f"--workdir={made[run]}", "--quiet", *(f.format(**places) for f in flags))
        row = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
        return hashlib.sha256(
            json.dumps({k: v for k, v in row.items() if k not in VOLATILE}, sort_keys=True).encode()
        ).hexdigest()[:16]

    def generate(name: str) -> str:
        if not drawn:
            drawn.update(pipelines(root / "pipelines"))
            drawn["depth"], drawn["depth_model"] = drawn["depth_map"], drawn["depth"]
        model, *flags = PICTURES[name]
        steps = [] if any(f.startswith("--steps") for f in flags) else ["--steps=4"]
        model = drawn["depth_model" if model == "depth" else model]
        ldm(
            "generate",
            f"--model={model}",
            f"--out={root / name}",
            "--quiet",
            *steps,
            *(f.format(**drawn) for f in flags),
        )
        return of_pictures(root / name)

    table = {f"run {name}": (train, name) for name in RUNS}
    table |= {f"draw {name}": (sample, name) for name in SAMPLES}
    table |= {f"measure {name}": (evaluate, name) for name in EVALUATIONS}
    table |= {f"generate {name}": (generate, name) for name in PICTURES}
    return {row: (lambda make=make, name=name: make(name)) for row, (make, name) in table.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fingerprints", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("words", nargs="*", help="only rows whose name holds one of these, and the runs they need")
    parser.add_argument("--file", type=pathlib.Path, default=FILE)
    args = parser.parse_args()
    expected = json.loads(args.file.read_text()) if args.what == "check" else {}
    root, made, wrong = pathlib.Path(tempfile.mkdtemp(prefix="fingerprints")), {}, 0
    try:
        for name, make in rows(root).items():
            needed = name.startswith("run ") and not all(word.startswith("generate") for word in args.words)
            if args.words and not needed and not any(word in name for word in args.words):
                continue
            begun = time.perf_counter()
            try:
                made[name] = make()
            except Exception as error:  # a row that cannot be made is a difference like any other
                made[name] = f"{type(error).__name__}: {error}"
            same = args.what == "record" or made[name] == expected.get(name)
            wrong += not same
            mark = "" if same else f"   was {expected.get(name, 'not there')}"
            print(f"{name:28} {made[name]}  {time.perf_counter() - begun:5.1f} s{mark}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if args.what == "record":
        args.file.parent.mkdir(parents=True, exist_ok=True)
        args.file.write_text(json.dumps(made, indent=1) + "\n")
        return 0
    print(f"{len(made)} rows, {wrong} changed" if wrong else f"{len(made)} rows, none changed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
