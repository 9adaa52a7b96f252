"""The first stage of imagenet256_dit_xl2: Stable Diffusion's f = 8 KL autoencoder (Rombach et al. 2022), 256 px -> 32 x 32 x 4.

    ldm train --config=configs/imagenet256_vae.py --workdir=runs/imagenet256_vae \\
        --config.task.perceptual.name=lpips:vgg16-397923af.pth,vgg.pth

The published structure and loss: L1, LPIPS, KL, and a discriminator of patches from step 50,001 on. The two files of LPIPS are
torchvision's VGG16 and the lpips package's heads (weights/v0.1/vgg.pth). Learning rates are per image as published, 4.5e-6 a batch of
one; the variance of the error stays at 1, as in the published code, whose optimizer was not told of it.
Expected: not run here; the published autoencoder, trained on Open Images, reaches rFID 0.90 on ImageNet.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    batch_size = 64
    c.task = {
        "name": "autoencoder",
        "reconstruction": "l1",
        "kl_weight": 1e-6,
        "perceptual": {"name": "lpips:vgg16.pth,heads.pth", "weight": 1.0},
        "adversarial": {
            "width": 64,
            "layers": 3,
            "norm": "batch",
            "loss": "hinge",
            "weight": 0.5,
            "adaptive": True,
            "start_images": 50_001 * batch_size,
        },
    }
    c.model = {
        "name": "autoencoder_kl",
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "remat": True,
    }
    c.data = {"name": "folder", "path": "imagenet", "skip_broken": False}
    c.split = {"train": "train", "tune": "val", "report": "val"}
    c.input.update(resolution=256, crop="adm", flip=True, num_threads=16, prefetch=16)
    c.optimizer = {
        "name": "adam",
        "learning_rate": 4.5e-6 * batch_size,
        "schedule": "constant",
        "warmup_images": 100_000,
        "clip_norm": 0.0,
        "b1": 0.5,
        "b2": 0.9,
    }
    c.ema = {"half_lives": (100_000,), "ramp": 0.05}
    c.train.update(
        images=20_000_000, batch_size=batch_size, log_every=6_400, validate_every=500_000, checkpoint_every=500_000
    )
    c.precision = "bfloat16"
    if arg == "smoke":
        base.smoke(c)
        c.data = {"name": "shapes", "size": 64}
        c.split = {"train": "train", "tune": "val", "report": "test"}
        c.input.update(resolution=32, flip=False, num_threads=2, prefetch=4)
        c.model.update(block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1)
        c.task.perceptual = {}
        c.task.adversarial.update(width=4, layers=2, start_images=16)
    return c
