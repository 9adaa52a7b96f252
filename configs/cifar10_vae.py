"""First stage for CIFAR-10: a KL autoencoder, 32 px -> 8 x 8 x 6 latents (Rombach et al. 2022, f = 4).

    ldm train --config=configs/cifar10_vae.py --workdir=runs/cifar10_vae
    ldm evaluate --workdir=runs/cifar10_vae --metrics=psnr --num=1000

Expected: 25.9 dB on 1,000 test images after 30k images, 6 minutes on two CPU cores. See experiments/cifar10_cpu/README.md.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.task = {"name": "autoencoder", "reconstruction": "l2", "kl_weight": 1e-3}
    c.model = {
        "name": "autoencoder_kl",
        "block_out_channels": (16, 48, 64),
        "layers_per_block": 1,
        "latent_channels": 6,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    }
    c.data = {"name": "zip", "path": "cifar10_jpeg.zip", "val_from_train": 500, "skip_broken": False}
    c.input.update(resolution=32, crop="none", flip=True, cache=True)
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_images": 1_000,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (1_000,), "ramp": 0.05}
    c.train.update(images=30_000, batch_size=16, log_every=3_200, validate_every=15_000, checkpoint_every=15_000)
    if arg == "smoke":
        base.smoke(c)
        c.model.update(block_out_channels=(8, 8, 8), norm_num_groups=4)
        c.input.cache = False
    return c
