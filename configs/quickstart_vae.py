"""First stage of the quickstart: a KL autoencoder on 32 px shapes, 8 x 8 x 4 latents (Rombach et al. 2022, f = 4).

ldm train --config=configs/quickstart_vae.py --workdir=runs/quickstart_vae
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config()
    c.task = {"name": "autoencoder", "reconstruction": "charbonnier", "kl_weight": 1e-4}
    c.model = {
        "name": "autoencoder_kl",
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    }
    c.data = {"name": "shapes", "size": 50_000}
    c.input.update(resolution=32, crop="none")
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_images": 2_000,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (2_000,), "ramp": 0.05}
    c.train.update(images=40_000, batch_size=64, log_every=3_200, pictures_every=0, checkpoint_every=20_000)
    if arg == "smoke":
        base.smoke(c)
        c.model.update(block_out_channels=(8, 8, 8), norm_num_groups=4)
        c.data.size = 256
    return c
