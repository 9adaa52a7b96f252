"""A small residual network on CIFAR-10: the feature extractor of `fd_classifier`, and what names the class of a sample.

    ldm train --config=configs/cifar10_classifier.py --workdir=runs/cifar10_classifier
    ldm evaluate --workdir=runs/cifar10_classifier --metrics=accuracy

Expected: 74 % of the validation images after 100k images, 4 minutes on two CPU cores; 78 % after 160k (--config.train.images=160000).
The images are JPEG re-encoded: not comparable digit for digit with the original data. See experiments/cifar10_cpu/README.md.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.task = {"name": "classifier", "label_smoothing": 0.1, "shift": 2}
    c.model = {"name": "classifier", "num_classes": 10, "widths": (32, 64, 128)}
    c.data = {"name": "zip", "path": "cifar10_jpeg.zip", "val_from_train": 500, "skip_broken": False}
    c.input.update(resolution=32, crop="none", flip=True, cache=True)
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": "linear",
        "warmup_images": 10_000,
        "clip_norm": 1.0,
        "weight_decay": 0.02,
    }
    c.ema = {"half_lives": (4_000,), "ramp": 0.05}
    c.train.update(
        images=100_000,
        batch_size=64,
        log_every=6_400,
        validate_every=50_000,
        validate_images=5_000,
        checkpoint_every=50_000,
    )
    if arg == "smoke":
        base.smoke(c)
        c.model["widths"] = (8, 8)
        c.model["norm_num_groups"] = 4
        c.input.cache = False
    return c
