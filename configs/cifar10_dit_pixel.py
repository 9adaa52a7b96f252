"""Class-conditional DiT on CIFAR-10 pixels (Peebles & Xie 2023, DiT-S with 2 x 2 patches), for one accelerator.

    ldm train --config=configs/cifar10_dit_pixel.py --workdir=runs/cifar10_dit_pixel
    ldm evaluate --workdir=runs/cifar10_dit_pixel --metrics=fid --num=50000 --labels=random --features=inception:WEIGHTS.pth \\
        --reference=split:train

Expected: not run here for want of an accelerator; DiT-S/2 on CIFAR-10 is reported between FID 5 and 15 at 100M to 200M images
elsewhere, in protocols that differ.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.task = {"name": "diffusion", "prediction": "flow", "times": "logit_normal", "weight": "simple", "drop": 0.1}
    c.model = {
        "name": "dit",
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 384,
        "depth": 12,
        "num_heads": 6,
        "num_classes": 10,
        "scan_layers": True,
    }
    c.data = {"name": "zip", "path": "cifar10_jpeg.zip", "val_from_train": 500, "skip_broken": False}
    c.input.update(resolution=32, crop="none", flip=True, cache=True)
    c.condition.label = True
    c.sampler.update(name="heun", steps=25, guidance=1.5, batch_size=500)
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 5e-4,
        "schedule": "constant",
        "warmup_images": 500_000,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (500_000, 2_000_000), "ramp": 0.05}
    c.train.update(
        images=100_000_000,
        batch_size=512,
        log_every=51_200,
        validate_every=1_000_000,
        pictures_every=1_000_000,
        pictures=100,
        checkpoint_every=1_000_000,
    )
    if arg == "smoke":
        base.smoke(c)
        c.model.update(hidden_size=32, depth=2, num_heads=2)
        c.input.cache = False
    return c
