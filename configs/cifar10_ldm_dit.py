"""Class-conditional latent DiT on CIFAR-10, sized for half an hour on two CPU cores, its first stage included.

DiT: Peebles & Xie 2023; rectified flow with logit-normal times: Esser et al. 2024, eq. 19.

    ldm train --config=configs/cifar10_ldm_dit.py --workdir=runs/cifar10_ldm_dit
    ldm evaluate --workdir=runs/cifar10_ldm_dit --metrics=fid,accuracy --num=2000 --features=classifier:runs/cifar10_classifier \\
        --reference=split:train

Expected: after 280k images (23 minutes on two CPU cores, the first stage beside them) fd_classifier 7.1 on 2,000 samples, of which the
classifier names 68 % (real test images: 0.7 and 73 %); 12.2 and 88 % with --guidance=4. See experiments/cifar10_cpu/README.md.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.task = {"name": "diffusion", "prediction": "flow", "times": "logit_normal", "weight": "simple", "drop": 0.1}
    c.model = {
        "name": "dit",
        "patch_size": 1,
        "in_channels": 6,
        "hidden_size": 128,
        "depth": 6,
        "num_heads": 4,
        "rope_theta": 100.0,
        "embed_std": 0.0,
        "num_classes": 10,
    }
    c.data = {"name": "zip", "path": "cifar10_jpeg.zip", "val_from_train": 500, "skip_broken": False}
    c.input.update(resolution=32, crop="none", flip=True)
    c.first_stage.update(config="configs/cifar10_vae.py", cache=True)
    c.condition.label = True
    c.sampler.update(name="dpmpp_2m", steps=20, guidance=2.0)
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "warmup_images": 5_000,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (10_000,), "ramp": 0.05}
    c.train.update(
        images=280_000,
        batch_size=32,
        log_every=6_400,
        validate_every=70_000,
        pictures_every=70_000,
        checkpoint_every=70_000,
    )
    c.train.pictures = 40
    if arg == "smoke":
        base.smoke(c)
        c.first_stage.config += ":smoke"
        c.first_stage.cache = False
        c.model.update(hidden_size=32, depth=2, num_heads=2)
    return c
