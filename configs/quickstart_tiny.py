"""A small autoencoder for previews of quickstart, in the latents of its first stage: 32 px <-> the whitened 8 x 8 x 6 latents.

    ldm train --config=configs/quickstart_tiny.py --workdir=runs/quickstart_tiny --config.first_stage.workdir=runs/quickstart_vae
    ldm train --config=configs/quickstart.py --workdir=runs/quickstart --config.first_stage.workdir=runs/quickstart_vae \\
        --config.first_stage.preview=runs/quickstart_tiny
    ldm evaluate --workdir=runs/quickstart_tiny --metrics=psnr --num=200

The plan of TAESD (the published AutoencoderTiny) with a quarter of its channels and one block a level; `weights.save` writes it as one.
Expected: not run here.
"""

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.task = {"name": "tiny_autoencoder"}
    c.model = {
        "name": "autoencoder_tiny",
        "encoder_block_out_channels": (16, 16, 16),
        "decoder_block_out_channels": (16, 16, 16),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
        "latent_channels": 6,
    }
    c.first_stage.config = "configs/quickstart_vae.py"
    c.data = {"name": "shapes", "size": 50_000}
    c.input.update(resolution=32, crop="none")
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_images": 500,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (1_000,), "ramp": 0.05}
    c.train.update(images=20_000, batch_size=16, log_every=1_600, validate_images=256, checkpoint_every=3_200)
    if arg == "smoke":
        base.smoke(c)
        c.first_stage.config += ":smoke"
        c.data.size = 256
    return c
