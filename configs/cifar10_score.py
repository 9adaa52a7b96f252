"""Score matching on CIFAR-10 pixels, without conditions: the three SDEs of Song et al. 2021 (arXiv:2011.13456), one word each.

    :ve (the default)  sigma from 0.01 to 50; an NCSN++ predicts the score, lambda(t) = sigma^2; annealed Langevin dynamics draws
                       (Song & Ermon 2019, arXiv:1907.05600, equation 6 and algorithm 1)
    :vp, :sub_vp       beta from 0.1 to 20, t from 1e-5 in training and 1e-3 in drawing; a U-Net predicts eps = -sigma score, with
                       the same lambda; a predictor and a corrector draw (algorithms 3 and 5)

    ldm train --config=configs/cifar10_score.py:ve --workdir=runs/score_ve
    ldm sample --workdir=runs/score_ve --num=16 --out=out --sampler=annealed_langevin,predictor_corrector:snr=0.16,heun
    ldm train --config=configs/cifar10_score.py:vp --workdir=runs/score_vp
    ldm evaluate --workdir=runs/score_vp --metrics=bits --num=200 --steps=20

heun is the probability-flow ODE, and so is every other sampler without noise (docs/score_matching.md).

Expected: not run to its end yet, see the table in README.md.
"""

from configs import base

LEVELS = 3


def get_config(arg: str = ""):
    chosen, small = base.choose(arg, sde=("ve", "vp", "sub_vp"))
    c = base.get_config()
    c.data = {"name": "zip", "path": "cifar10_jpeg.zip", "val_from_train": 500, "skip_broken": False}
    c.input.update(resolution=32, crop="none", flip=True, cache=True)
    c.model = {
        "name": "unet",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": 32,
    }
    c.task = {"name": "diffusion", "times": "uniform"}
    if chosen["sde"] == "ve":
        c.process = {"name": "ve", "sigma_min": 0.01, "sigma_max": 50.0}
        c.task.update(prediction="score", weight="snr")  # snr: lambda(t) = sigma^2 on the error of the score
        c.model.update(
            down_block_types=("SkipDownBlock2D",) * LEVELS,
            up_block_types=("SkipUpBlock2D",) * LEVELS,
            norm_num_groups=None,
            time_embedding_type="fourier_log",  # it takes sigma, and divides its output by it
        )
        # On 60 levels a step of 0.1 lags behind the noise, whose variance is then twice sigma^2; with 0.4 it is 1.16 sigma^2.
        c.sampler.update(name="annealed_langevin", options={"steps": 5, "step_size": 0.4}, steps=60)
    else:
        c.process = {"name": {"vp": "vp_linear", "sub_vp": "sub_vp"}[chosen["sde"]], "t_min": 1e-5}
        c.task.update(prediction="eps", weight="simple")
        c.model.update(
            down_block_types=("DownBlock2D",) * LEVELS, up_block_types=("UpBlock2D",) * LEVELS, norm_num_groups=4
        )
        c.sampler.update(name="predictor_corrector", options={"snr": 0.05}, steps=150, grid_options={"end": 1e-3})
    c.sampler.batch_size = 100
    c.optimizer = {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": "constant",
        "warmup_images": 2_000,
        "clip_norm": 1.0,
        "b2": 0.99,
    }
    c.ema = {"half_lives": (3_000,), "ramp": 0.05}
    c.train.update(
        images=30_000,
        batch_size=32,
        log_every=1_600,
        validate_every=6_000,
        validate_images=200,
        checkpoint_every=2_000,
    )
    if small:
        base.smoke(c)
        c.model.update(block_out_channels=(8, 8, 16), attention_head_dim=8)
        c.input.cache = False
    return c
