"""The KL autoencoders of latent diffusion at 256 px (Rombach et al. 2022, table 8): f = 4, 8 or 16.

    ldm train --config=configs/imagenet256_vae.py --workdir=runs/imagenet256_vae \\
        --config.task.perceptual.name=lpips:vgg16-397923af.pth,vgg.pth
    ldm train --config=configs/imagenet256_vae.py:f16 --workdir=runs/imagenet256_vae_f16 ...
    ldm evaluate --workdir=runs/imagenet256_vae --metrics=psnr,rfid --num=50000 --features=inception:WEIGHTS.pth

After the colon: f4, f8 (the default: the structure of Stable Diffusion's) or f16; and smoke. Latents are
64 x 64 x 3, 32 x 32 x 4, 16 x 16 x 16. The published structure and loss: L1, LPIPS, KL, and a discriminator of patches from step
50,001 on. The two files of LPIPS are torchvision's VGG16 and the lpips package's heads (weights/v0.1/vgg.pth). Learning rates are per
image as published, 4.5e-6 a batch of one; the variance of the error stays at 1, as in the published code, whose optimizer was not told
of it.
Expected: not run here; the published ones, trained on Open Images, reach rFID 0.27, 0.90 and 0.87 on ImageNet.
"""

from configs import base

# f: widths of the levels, channels of the latent. Only f = 16 attends at its lowest level, as well as in the middle.
WIDTHS = {"f4": (128, 256, 512), "f8": (128, 256, 512, 512), "f16": (128, 128, 256, 256, 512)}
CHANNELS = {"f4": 3, "f8": 4, "f16": 16}


def get_config(arg: str = ""):
    chosen, smoke = base.choose(arg, f=("f8", "f4", "f16"))
    f = chosen["f"]
    c = base.get_config("smoke" if smoke else "")
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
        "block_out_channels": WIDTHS[f],
        "layers_per_block": 2,
        "latent_channels": CHANNELS[f],
        "norm_num_groups": 32,
        "remat": True,
    }
    if f == "f16":
        c.model.down_block_types = ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",)
        c.model.up_block_types = ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4
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
    if smoke:
        base.smoke(c)
        c.data = {"name": "shapes", "size": 64}
        c.split = {"train": "train", "tune": "val", "report": "test"}
        c.input.update(resolution=32, flip=False, num_threads=2, prefetch=4)
        c.model.update(block_out_channels=(8,) * len(WIDTHS[f]), norm_num_groups=4, layers_per_block=1)
        c.task.perceptual = {}
        c.task.adversarial.update(width=4, layers=2, start_images=16)
    return c
