"""A DiT in pixels that fills in what is missing of a 32 px emoji, or, with ':enlarge', makes one of 8 px four times as large.

Inpainting: Rombach et al. 2022, section 4.5, as published networks take it: mask and masked picture are further channels.
Super-resolution: Saharia et al. 2022 (SR3), with the augmentation of Ho et al. 2022 (CDM, section 4.2).

    ldm train --config=configs/emoji32_inpaint.py --workdir=runs/emoji32_inpaint
    ldm sample --workdir=runs/emoji32_inpaint --num=24 --out=samples
    ldm generate --model=runs/emoji32_inpaint --init-image=face.png --mask=mouth.png --num=8 --out=faces
    ldm evaluate --workdir=runs/emoji32_inpaint --metrics=fd --num=500 --features=classifier:runs/judge

    ldm train --config=configs/emoji32_inpaint.py:enlarge --workdir=runs/emoji32_enlarge
    ldm generate --model=runs/emoji32_enlarge --init-image=small.png --num=8 --out=large

Expected: after 27k images what is around the hole stays, and the hole gets the right colours without their shapes
(docs/conditions.md); the whole length was not run.
"""

from configs import base


def get_config(arg: str = ""):
    chosen, smoke = base.choose(arg, what=("inpaint", "enlarge"))
    c = base.get_config()
    c.task = {"name": "diffusion", "prediction": "flow", "times": "logit_normal", "weight": "simple"}
    c.model = {
        "name": "dit",
        "patch_size": 4,
        "in_channels": 7,
        "out_channels": 3,
        "hidden_size": 128,
        "depth": 4,
        "num_heads": 4,
        "rope_theta": 100.0,
        "embed_std": 0.0,
    }
    # Never dropped: a picture is drawn without guidance, and there is no network without this condition.
    c.condition = {"masked_image": {"drop": 0.0}}
    if chosen["what"] == "enlarge":
        c.condition = {"low_resolution": {"drop": 0.0, "factor": 4, "noise": 0.3}}
        c.model.in_channels = 7  # of the picture 3, of the small one 3, of its noise 1
    c.data = {"name": "zip", "path": "emoji128.zip", "skip_broken": False}
    c.split.report = "test_style"
    c.input.update(resolution=32, crop="lanczos", cache=True)
    c.sampler.update(name="dpmpp_2m", steps=20)
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_images": 2_000,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (2_000,), "ramp": 0.05}
    c.train.update(
        images=40_000,
        batch_size=16,
        log_every=1_600,
        validate_images=172,
        pictures=24,
        pictures_every=20_000,
        checkpoint_every=8_000,
    )
    if smoke:
        base.smoke(c)
        c.input.cache = False
        c.model.update(hidden_size=32, depth=2, num_heads=2)
    return c
