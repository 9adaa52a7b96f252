"""First stage of the quickstart: a KL autoencoder on 32 px shapes, 8 x 8 x 6 latents (Rombach et al. 2022, f = 4).

    ldm train --config=configs/quickstart_vae.py --workdir=runs/quickstart_vae
    ldm evaluate --workdir=runs/quickstart_vae --metrics=psnr --num=200

Expected: 26.3 dB on 200 test images after 4.8k images (a minute on two CPU cores). Small batches matter:
with widths (16, 32, 64) and 4 channels, 6k images reached 21.3 dB at batch 32 and 24.0 dB at batch 16.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.task = {"name": "autoencoder", "reconstruction": "l2", "kl_weight": 1e-3}
    c.model = {
        "name": "autoencoder_kl",
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "latent_channels": 6,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    }
    c.data = {"name": "shapes", "size": 50_000}
    c.input.update(resolution=32, crop="none")
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "warmup_images": 500,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (300,), "ramp": 0.05}
    c.train.update(images=4_800, batch_size=8, log_every=800, validate_images=256, checkpoint_every=3_200)
    if arg == "smoke":
        base.smoke(c)
        c.model.update(block_out_channels=(8, 8, 8), norm_num_groups=4)
        c.data.size = 256
    return c
