"""The VQ-f4 first stage of latent diffusion (Rombach et al. 2022, appendix G): 256 px -> 64 x 64 latents of 3, 8192 entries.

    ldm train --config=configs/imagenet256_vq.py --workdir=runs/imagenet256_vq \\
        --config.task.perceptual.name=lpips:vgg16-397923af.pth,vgg.pth
    ldm evaluate --workdir=runs/imagenet256_vq --metrics=psnr,rfid,codebook --num=50000 --features=inception:WEIGHTS.pth

The published structure and loss: L1, LPIPS, codebook and commitment by gradient, and a discriminator of patches from the first step
on. The published code puts its beta of 0.25 on the codebook's term, whose scale Adam takes out again: the commitment
counts 1. For the codebook by an average: --config.task.codebook_decay=0.99 --config.task.revive_after=100000.
After the colon: vq (the default), or fsq, which quantizes to a fixed grid of 15,360 codes (Mentzer et al. 2023, table 1) in the same
encoder and decoder; and smoke.
Expected: not run here; the published autoencoder, trained on Open Images, reaches rFID 0.58 on ImageNet.
"""

from configs import base, imagenet256_vae


def get_config(arg: str = ""):
    chosen, smoke = base.choose(arg, latent=("vq", "fsq"))
    c = imagenet256_vae.get_config("f4,smoke" if smoke else "f4")
    del c.task.kl_weight, c.model.latent_channels
    c.task.adversarial.update(weight=0.75, start_images=0)
    if chosen["latent"] == "fsq":
        c.model.update(name="fsq", levels=(8, 8, 8, 6, 5))
        return c
    c.task.update(commitment=1.0, codebook_decay=0.0, revive_after=0)
    c.model.update(name="vq", latent_channels=3, num_vq_embeddings=32 if smoke else 8192)
    return c
