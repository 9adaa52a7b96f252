"""The VQ-f4 first stage of latent diffusion (Rombach et al. 2022, appendix G): 256 px -> 64 x 64 latents of 3, 8192 entries.

    ldm train --config=configs/imagenet256_vq.py --workdir=runs/imagenet256_vq \\
        --config.task.perceptual.name=lpips:vgg16-397923af.pth,vgg.pth

The published structure and loss: L1, LPIPS, codebook and commitment by gradient, and a discriminator of patches from the first step
on. The published code puts its beta of 0.25 on the codebook's term, whose scale Adam takes out again: the commitment
counts 1. For the codebook by an average: --config.task.codebook_decay=0.99 --config.task.revive_after=100000.
Expected: not run here; the published autoencoder, trained on Open Images, reaches rFID 0.58 on ImageNet.
"""

from configs import imagenet256_vae


def get_config(arg: str = ""):
    c = imagenet256_vae.get_config(arg)
    c.task = {
        "name": "autoencoder",
        "reconstruction": "l1",
        "commitment": 1.0,
        "codebook_decay": 0.0,
        "revive_after": 0,
        "perceptual": c.task.perceptual,
        "adversarial": c.task.adversarial,
    }
    c.task.adversarial.update(weight=0.75, start_images=0)
    c.model = {
        "name": "vq",
        "block_out_channels": (128, 256, 512),
        "layers_per_block": 2,
        "latent_channels": 3,
        "num_vq_embeddings": 8192,
        "norm_num_groups": 32,
        "remat": True,
    }
    if arg == "smoke":
        c.model.update(block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1, num_vq_embeddings=32)
    return c
