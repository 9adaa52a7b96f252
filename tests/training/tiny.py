"""A training run that compiles in about a second: the real loop, data and checkpoints around a very small autoencoder."""

from configs import base
from ldm_jax.kernels import mesh
from ldm_jax.training import build, experiment


def config(**train):
    c = base.get_config()
    c.task = {"name": "autoencoder"}
    c.model = {
        "name": "autoencoder_kl",
        "block_out_channels": (4,),
        "layers_per_block": 1,
        "latent_channels": 2,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    }
    c.data = {"name": "shapes", "size": 64}
    c.input.update(crop="none", num_threads=2, prefetch=2)
    base.smoke(c)
    c.ema.half_lives = (100, 1000)
    c.train.update(images=96, batch_size=8, log_every=16, checkpoint_every=32, validate_every=0, pictures_every=0)
    c.train.update(**train)
    return c.lock()


def built(config, workdir, stage=None):
    """(task, data) of a config, as the loop builds them."""
    workdir.mkdir(exist_ok=True)
    parsed = experiment.parse(config)
    train, tune = build.sources(parsed)
    task = build.task(parsed, build.full_context(parsed, stage, train))
    return task, build.data(parsed, stage, workdir, mesh.make_mesh(), train, tune, lambda text: None)
