"""A text-conditional latent DiT on 64 px emoji in two drawing styles, its first stage one of configs/first_stage64.py.

DiT: Peebles & Xie 2023; rectified flow with logit-normal times: Esser et al. 2024, eq. 19; cross-attention to words: Chen et al. 2023.

    ldm train --config=configs/emoji64_ldm_dit.py --workdir=runs/emoji64
    ldm sample --workdir=runs/emoji64 --prompts=split:test_style --num=32 --out=samples
    ldm evaluate --workdir=runs/emoji64 --metrics=clip,cmmd --num=500 --features=clip:FOLDER --prompts=split:test_style \\
        --reference=split:test_style

A caption is "flat emoji of ..." or "3D emoji of ...". The vocabulary, configs/emoji64_words.txt, is every word of the training
captions; test_style and test_tone have no other, test_concept has.
Expected: after 120k images (24 minutes on two CPU cores) validation loss 0.351, and the pictures in experiments/first_stage/README.md.
"""

import pathlib

from configs import base


def get_config(arg: str = ""):
    c = base.get_config(arg)
    c.task = {"name": "diffusion", "prediction": "flow", "times": "logit_normal", "weight": "simple", "drop": 0.1}
    c.model = {
        "name": "dit",
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 192,
        "depth": 6,
        "num_heads": 6,
        "rope_theta": 100.0,
        "embed_std": 0.0,
        "text_dim": 128,
    }
    c.data = {"name": "zip", "path": "emoji128.zip", "skip_broken": False}
    c.split.report = "test_style"
    c.input.update(resolution=64, crop="lanczos")
    c.first_stage.update(config="configs/first_stage64.py:emoji,kl,all", cache=True)
    c.condition.text = True
    c.tokenizer = {
        "name": "words",
        "vocabulary": " ".join((pathlib.Path(__file__).parent / "emoji64_words.txt").read_text().split()),
        "length": 16,
    }
    c.text = {"width": 128, "depth": 1, "heads": 4}
    c.sampler.update(name="dpmpp_2m", steps=20, guidance=3.0)
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_images": 4_000,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (4_000,), "ramp": 0.05}
    c.train.update(
        images=120_000,
        batch_size=32,
        log_every=6_400,
        validate_images=172,
        pictures=24,
        pictures_every=40_000,
        checkpoint_every=40_000,
    )
    if arg == "smoke":
        base.smoke(c)
        c.first_stage.config += ",smoke"
        c.input.resolution = 32
        c.model.update(hidden_size=32, depth=2, num_heads=2, text_dim=16)
        c.text.update(width=16, depth=1, heads=2)
    return c
