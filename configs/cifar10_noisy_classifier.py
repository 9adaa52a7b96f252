"""A classifier of noisy CIFAR-10, to guide a diffusion model with (Dhariwal & Nichol 2021, section 4): in pixels, or ':latent'.

    ldm train --config=configs/cifar10_noisy_classifier.py --workdir=runs/cifar10_noisy_classifier
    ldm train --config=configs/cifar10_noisy_classifier.py:latent --workdir=runs/cifar10_noisy_latent \\
        --config.first_stage.workdir=runs/cifar10_vae
    ldm sample --workdir=runs/cifar10_ldm_dit --num=10 --out=out --guidance=0 --classifier=runs/cifar10_noisy_latent \\
        --classifier-scale=0,1,2,4
    ldm evaluate --workdir=runs/cifar10_ldm_dit --num=1000 --guidance=0 --classifier=runs/cifar10_noisy_latent --classifier-scale=2 \\
        --metrics=fid,accuracy --features=classifier:runs/cifar10_classifier

The last two lines draw the null class of the model that is guided. The classifier must be trained in the latents of that model's first
stage and with that model's process: here it is the flow, as in cifar10_dit_pixel.py and cifar10_ldm_dit.py.

Expected: ':latent' names 54, 53, 49, 35 and 18 % of 5,000 validation images at t = 0.1, 0.3, 0.5, 0.7 and 0.9 (val_accuracy/t0.1 to
val_accuracy/t0.9) after 200k images at a constant learning rate, on a first stage of 10k images: with --config.train.images=200000
--config.optimizer.schedule=constant. In pixels, and at the length that stands here: not run. More is in
experiments/cifar10_classifier_guidance/README.md.
"""

from configs import base


def get_config(arg: str = ""):
    chosen, smoke = base.choose(arg, space=("pixel", "latent"))
    c = base.get_config()
    c.task = {"name": "noisy_classifier"}
    c.model = {
        "name": "noisy_classifier",
        "num_classes": 10,
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 1,
        "attention_levels": 1,
        "attention_head_dim": 32,
        "dropout": 0.1,
    }
    c.process = {"name": "flow"}
    c.data = {"name": "zip", "path": "cifar10_jpeg.zip", "val_from_train": 500, "skip_broken": False}
    c.input.update(resolution=32, crop="none", flip=True, cache=True)
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_images": 10_000,
        "clip_norm": 1.0,
        "weight_decay": 0.05,
    }
    c.ema = {"half_lives": (10_000,), "ramp": 0.05}
    c.train.update(
        images=500_000,
        batch_size=64,
        log_every=6_400,
        validate_every=100_000,
        validate_images=5_000,
        checkpoint_every=100_000,
    )
    if chosen["space"] == "latent":
        c.first_stage.config = "configs/cifar10_vae.py"
        c.model.update(in_channels=6, block_out_channels=(64, 96))
        c.input.cache = False
    if smoke:
        base.smoke(c)
        c.model.update(block_out_channels=(8, 16), attention_head_dim=8, norm_num_groups=4)
        c.input.cache = False
        if chosen["space"] == "latent":
            c.first_stage.config += ":smoke"
    return c
