"""Learning rate x width: does the best learning rate of a small latent DiT on CIFAR-10 move with its width?

Short runs of configs/cifar10_ldm_dit.py, compared by their last validation loss. All share one autoencoder, which
LDM_FIRST_STAGE names (default: runs/cifar10_ldm_dit/first_stage, made by training that config).

    ldm train --config=configs/cifar10_ldm_dit.py --workdir=runs/cifar10_ldm_dit
    ldm sweep experiments/lr_width.py --workdir=runs/lr_width --publish=experiments/lr_width
"""

import os

from ldm_jax.sweeps import Plot, Study, product, sweep, train_and_evaluate


def get_study() -> Study:
    shared = {
        "train.images": 10_000,
        "optimizer.warmup_images": 1_000,
        "ema.half_lives": (5_000,),
        "train.pictures_every": 0,
        "first_stage.workdir": os.environ.get("LDM_FIRST_STAGE", "runs/cifar10_ldm_dit/first_stage"),
    }
    return Study(
        name="lr_width",
        title="CIFAR-10 latent DiT: learning rate and width (10k images each)",
        runs=product(
            sweep("model.hidden_size", [64, 128, 192]),
            sweep("optimizer.learning_rate", [5e-4, 2e-3, 8e-3]),
        ),
        commands=train_and_evaluate("configs/cifar10_ldm_dit.py", fixed=shared),
        objective="val_loss",
        columns=("val_loss", "loss"),
        plot=(
            Plot(x="optimizer.learning_rate", y="val_loss", hue="model.hidden_size", log_x=True),
            Plot(x="optimizer.learning_rate", y="val_loss", hue="model.hidden_size", kind="heat"),
        ),
    )
