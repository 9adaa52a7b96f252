"""A small residual network on 64 px photographs of 94 kinds: what the perceptual term of first_stage64 sees with.

    ldm train --config=configs/photos64_classifier.py --workdir=runs/photos64_classifier
    ldm evaluate --workdir=runs/photos64_classifier --metrics=accuracy

With another seed and width (--config.seed=1 --config.model.widths="(24, 48, 96)") it measures reconstructions: a Frechet
distance in the features of the network that was trained against would flatter.
Expected: 46.0 % of 1,008 held-out photographs (seed 0), 42.3 % (the other).
"""

from configs import cifar10_classifier


def get_config(arg: str = ""):
    c = cifar10_classifier.get_config(arg)
    c.model.num_classes = 94
    c.data = {"name": "zip", "path": "caltech101_128.zip", "skip_broken": False}
    c.input.update(resolution=64, crop="lanczos")
    c.task.shift = 4
    if arg == "smoke":
        c.input.resolution = 32
        return c
    c.train.update(images=30_000, validate_every=0, validate_images=337, checkpoint_every=15_000)
    c.optimizer.warmup_images = 2_000
    return c
