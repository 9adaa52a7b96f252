"""Learning rate x width: does the best learning rate of a small latent DiT on CIFAR-10 move with its width?

Short runs of configs/cifar10_ldm_dit.py, compared by their last validation loss.

    ldm sweep experiments/lr_width.py --workdir=runs/lr_width --publish=experiments/lr_width
"""

from ldm_jax.sweeps import Plot, Study, fixed, product, sweep, train_and_evaluate


def get_study() -> Study:
    return Study(
        name="lr_width",
        title="CIFAR-10 latent DiT: learning rate and width (20k images each)",
        runs=product(
            sweep("model.hidden_size", [96, 192, 288]),
            sweep("optimizer.learning_rate", [2e-4, 5e-4, 1e-3, 2e-3]),
            fixed("train.images", 20_000),
        ),
        commands=train_and_evaluate("configs/cifar10_ldm_dit.py"),
        objective="val_loss",
        columns=("val_loss", "loss"),
        plot=(
            Plot(x="optimizer.learning_rate", y="val_loss", hue="model.hidden_size", log_x=True),
            Plot(x="optimizer.learning_rate", y="val_loss", hue="model.hidden_size", kind="heat"),
        ),
    )
