"""Class-conditional latent U-Net on CIFAR-10 (Rombach et al. 2022; ADM's blocks, Dhariwal & Nichol 2021), for comparison with the DiT.

    ldm train --config=configs/cifar10_ldm_unet.py --workdir=runs/cifar10_ldm_unet
    ldm evaluate --workdir=runs/cifar10_ldm_unet --metrics=fid,accuracy --num=2000 --features=classifier:runs/cifar10_classifier \\
        --reference=split:train

Expected: colours and layouts of the classes after as many images; not run to its end yet, see the table in README.md.
"""

from configs import cifar10_ldm_dit


def get_config(arg: str = ""):
    c = cifar10_ldm_dit.get_config(arg)
    c.model = {
        "name": "unet",
        "in_channels": 6,
        "out_channels": 6,
        "block_out_channels": (128, 192),
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 1,
        "attention_head_dim": 32,
        "norm_num_groups": 16,
        "num_class_embeds": 11,
        "resnet_time_scale_shift": "scale_shift",
    }
    c.optimizer.learning_rate = 1e-3
    if arg == "smoke":
        c.model.update(block_out_channels=(16, 16), norm_num_groups=4, attention_head_dim=8)
    return c
