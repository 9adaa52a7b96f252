"""The first stage of imagenet256_dit_xl2: Stable Diffusion's f = 8 KL autoencoder (Rombach et al. 2022), 256 px -> 32 x 32 x 4.

    ldm train --config=configs/imagenet256_vae.py --workdir=runs/imagenet256_vae

The paper takes the published weights (ft-EMA); this trains the same structure with the reconstruction and KL terms alone.
Expected: not run here; the published autoencoder reaches rFID 0.6 on ImageNet with perceptual and adversarial terms.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.task = {"name": "autoencoder", "reconstruction": "l1", "kl_weight": 1e-6}
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
        "name": "adamw",
        "learning_rate": 1e-4,
        "schedule": "constant",
        "warmup_images": 100_000,
        "clip_norm": 1.0,
    }
    c.ema = {"half_lives": (100_000,), "ramp": 0.05}
    c.train.update(images=20_000_000, batch_size=64, log_every=6_400, validate_every=500_000, checkpoint_every=500_000)
    c.precision = "bfloat16"
    if arg == "smoke":
        base.smoke(c)
        c.data = {"name": "shapes", "size": 64}
        c.split = {"train": "train", "tune": "val", "report": "test"}
        c.input.update(resolution=32, flip=False, num_threads=2, prefetch=4)
        c.model.update(block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1)
    return c
