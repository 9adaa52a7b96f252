"""DiT-XL/2 on ImageNet 256 x 256 latents: the recipe of Peebles & Xie 2023, section 4 and table 4.

Linear-beta DDPM with 1000 steps, eps prediction with learned variance (hybrid loss), batch 256, AdamW 1e-4 constant without
weight decay or warm-up, EMA 0.9999, 10 % label dropout, 7M steps; random flips the only augmentation; DDPM-250 sampling, guidance
1.5, which the published code applies to the first three of the four channels.

The first stage is the published one, Stable Diffusion's autoencoder with the decoder ft-EMA: f = 8, 4 channels, scaling_factor 0.18215.
It is fetched by its name; without a network, name the folder that holds it with --config.first_stage.workdir=FOLDER.

    ldm encode --workdir=hub:stabilityai/sd-vae-ft-ema --data=configs/imagenet256_dit_xl2.py:train --out=latents --flip
    ldm train --config=configs/imagenet256_dit_xl2.py --workdir=runs/dit_xl2 --config.first_stage.latents=latents --config.mesh.fsdp=8
    ldm evaluate --workdir=runs/dit_xl2 --metrics=fid,sfid,is --num=50000 --labels=random --features=inception:WEIGHTS.pth \\
        --reference=VIRTUAL_imagenet256_labeled.npz

The reference is that of ADM's evaluation code (Dhariwal & Nichol 2021), labels are drawn at random, the parameters are those of the EMA
(the default of a run that keeps one), as for the published figure. With --config.first_stage.workdir= (empty) the autoencoder of
configs/imagenet256_vae.py is trained first, in runs/dit_xl2/first_stage: another first stage, with measured statistics, for which no
figure is published.

`ldm convert` writes such a run as a DiTPipeline of diffusers', which time_shift 1 is for: the frequencies of t that its port of DiT
runs the published weights with.

The images lie in class folders, $LDM_DATA/imagenet/train/CLASS/*.JPEG and .../val/....
Expected: not run here; in the paper FID-50K 2.27 at 7M steps, 9.62 with --guidance=1.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.task = {
        "name": "diffusion",
        "prediction": "eps",
        "times": "uniform",
        "weight": "simple",
        "drop": 0.1,
        "stratified": False,
        "learned_variance": True,
    }
    c.process = {"name": "discrete_vp", "betas": "linear"}
    c.model = {
        "name": "dit",
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "hidden_size": 1152,
        "depth": 28,
        "num_heads": 16,
        "num_classes": 1000,
        "time_shift": 1.0,
        "remat": True,
        "scan_layers": True,
    }
    c.data = {"name": "folder", "path": "imagenet", "skip_broken": False}
    c.split = {"train": "train", "tune": "val", "report": "val"}
    c.input.update(resolution=256, crop="adm", flip=True, num_threads=16, prefetch=16)
    c.first_stage.update(workdir="hub:stabilityai/sd-vae-ft-ema", config="configs/imagenet256_vae.py", cache=True)
    c.condition.label = True
    # The original's spacing, (999, ..., 12, 8, 4, 0), and its guidance of three channels of four.
    c.sampler.update(name="ddpm", steps=250, options={"variance": "learned"}, grid="linspace", guidance=1.5)
    c.sampler.guidance_options = {"channels": 3}
    c.optimizer = {"name": "adamw", "learning_rate": 1e-4, "schedule": "constant", "warmup_images": 0, "clip_norm": 0.0}
    # beta 0.9999 at batch 256: half-life = 256 log(0.5) / log(0.9999).
    c.ema = {"half_lives": (1_774_000,), "ramp": 0.0}
    c.train.update(
        images=1_792_000_000,
        batch_size=256,
        log_every=25_600,
        validate_every=6_400_000,
        validate_images=5_000,
        pictures_every=6_400_000,
        pictures=64,
        checkpoint_every=12_800_000,
        keep=3,
    )
    c.precision = "bfloat16"
    if arg == "smoke":
        base.smoke(c)
        c.first_stage.update(config="configs/imagenet256_vae.py:smoke", workdir="", cache=False)
        c.data = {"name": "shapes", "size": 64}
        c.split = {"train": "train", "tune": "val", "report": "test"}
        c.input.update(resolution=32, flip=False, num_threads=2, prefetch=4)
        c.model.update(hidden_size=32, depth=2, num_heads=2, num_classes=4)
    return c
