"""What every config is a small difference over: each key with the default it has and what reads it.

Durations are counted in images, so that a sweep over batch size stays fair. An empty block is one that the task does not use.

A config has the keys below and no others. The blocks task, model, data, process, tokenizer, text and optimizer, and each block in
condition, go whole to the constructor named in them and have its arguments: what a file leaves out of them has the constructor's
default, and a command line may set it (--config.model.dropout=0.1). A key that is unknown, of another type or out of range
(config/config_keys.py) is refused, and so are networks that do not fit (training/check.py), before any work is done. A block that a
file replaces whole has the defaults below for what it leaves out, and so has a run that was started before there was such a key: a
new key's default is what runs did before.
"""

from ml_collections import ConfigDict


def choose(arg: str, **choices: tuple[str, ...]) -> tuple[dict[str, str], bool]:
    """The words after the colon, in any order: ({what: the word chosen, the first if none is}, whether 'smoke' is among them)."""
    words = [word for word in arg.split(",") if word]
    allowed = [*(word for choice in choices.values() for word in choice), "smoke"]
    if unknown := [word for word in words if word not in allowed]:
        raise ValueError(f"unknown argument {unknown[0]!r} after the colon; there are {', '.join(allowed)}")
    chosen = {}
    for what, choice in choices.items():
        picked = [word for word in words if word in choice] or [choice[0]]
        if len(picked) > 1:
            raise ValueError(f"{' and '.join(picked)} after the colon; expected one of {', '.join(choice)}")
        chosen[what] = picked[0]
    return chosen, "smoke" in words


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"unknown argument {arg!r} after the colon; there is 'smoke'")
    c = ConfigDict()
    c.seed = 0
    # 'float32', 'bfloat16', or 'auto': bfloat16 where the hardware multiplies it faster (TPU, GPU, CPU with AMX).
    c.precision = "auto"

    # What is trained: training/tasks. The block's other keys go to that task's `make`, which says what they mean: for diffusion
    # prediction, learned_variance, times, weight, stratified, drop, vlb_weight, uncertainty; for autoencoder reconstruction,
    # learned_variance, kl_weight, kl_warmup_images, commitment, codebook_decay, revive_after, equivariance, train, and three blocks,
    # {} or left out for none: perceptual and align, each {"name", "weight"}, and adversarial (training/terms, a file a block).
    # tiny_autoencoder (a small autoencoder from the first stage below) has no keys.
    c.task = ConfigDict({"name": "diffusion"})
    # The network that is trained, from models.MODELS.
    c.model = ConfigDict({"name": "dit"})

    # Images: data.SOURCES (docs/data.md: what folders and zips may look like), and which of its splits serves what. Reports
    # (`ldm evaluate`) read `report` alone.
    c.data = ConfigDict({"name": "shapes"})
    c.split = ConfigDict({"train": "train", "tune": "val", "report": "test"})
    c.input = ConfigDict(
        {
            "resolution": 32,
            # The entry of a batch that is modelled: 'image', 'video' or what a data source calls it; and the shape of one item,
            # channels last, such as (16, 64, 64, 3) or (4096, 2); (): that of an image.
            "entry": "image",
            "shape": (),
            "crop": "adm",  # 'adm', 'lanczos' or 'none'
            "flip": False,
            "cache": False,  # decode once, keep in memory
            "num_threads": 4,
            "prefetch": 8,
        }
    )

    # Diffusion only: the space, the process, the conditions of the network, how pictures are drawn from it.
    c.first_stage = ConfigDict(
        {
            "config": "",  # config file of the autoencoder; empty: pixels
            # A run that has trained it, or a published autoencoder: a folder, a file, hub:OWNER/NAME (docs/first_stages.md). Empty:
            # DIR/first_stage, trained there when it is missing.
            "workdir": "",
            # 'auto': scaling_factor and shift_factor of a published autoencoder, statistics measured over the training images
            # for any other; 'measured': those in any case.
            "whitening": "auto",
            "cache": True,  # encode the data set once, train on the cached posteriors
            "latents": "",  # where the cache lies, such as what `ldm encode` wrote; empty: in the stage's folder, shared
            "preview": "",  # a run of the task tiny_autoencoder, which then decodes the pictures drawn while training
        }
    )
    c.process = ConfigDict({"name": "flow"})
    # What the denoiser is conditioned on: True, or a block of options (training/conditions; docs/conditions.md). `drop` in a block
    # drops this condition by itself; those without are dropped together by task.drop.
    c.condition = ConfigDict({"label": False, "text": False}, type_safe=False)
    c.tokenizer = ConfigDict({"name": "bytes", "length": 96})
    c.text = ConfigDict({"width": 128, "depth": 2, "heads": 4})
    c.sampler = ConfigDict(
        {
            "name": "heun",
            "options": {},  # of the sampler's constructor, such as ddim's eta
            "steps": 25,
            "grid": "uniform",
            "grid_options": {},  # of the grid's, such as karras' rho
            "guidance": 1.0,  # the scale; 1: none, for cfg and apg
            "guidance_method": "cfg",  # cfg, apg, cfg_zero or cfg_pp (sampling/settings.METHODS)
            "guidance_options": {},  # of the method's, such as apg's eta
            "guidance_schedule": "constant",  # the scale over time: diffusion.guidance.SHAPES, powered_cosine
            "schedule_options": {},  # of the schedule's, such as floor
            "threshold": "none",  # 'static' or 'dynamic' keep the estimate in range: for pixels
            "threshold_options": {},  # of the threshold's, such as dynamic's percentile
            "t_lo": 0.0,  # guidance acts on t in [t_lo, t_hi]
            "t_hi": 1.0,
            "rescale": 0.0,
            "batch_size": 128,
        }
    )

    c.optimizer = ConfigDict(
        {"name": "adamw", "learning_rate": 1e-3, "schedule": "constant", "warmup_images": 0, "clip_norm": 1.0}
    )
    c.ema = ConfigDict({"half_lives": (50_000,), "ramp": 0.05})  # the first is the one that is looked at
    # Start from another run's parameters (of an average; 'none': the raw ones), or from a published network's .safetensors.
    c.init_from = ConfigDict({"workdir": "", "ema": "", "file": ""})

    c.train = ConfigDict(
        {
            "images": 1_000_000,
            "batch_size": 128,
            "accumulate": 1,
            "log_every": 6_400,
            "validate_every": 0,  # 0: at the end
            "validate_images": 1_000,
            "pictures_every": 0,
            "pictures": 16,
            "checkpoint_every": 0,
            "keep": 2,
            "keep_every": 0,
        }
    )

    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "min_size": 2**16, "rules": ()})
    return c


def smoke(c: ConfigDict) -> ConfigDict:
    """The same config for a few seconds on a laptop: every code path, tiny sizes."""
    c.precision = "float32"
    c.train.update(
        images=64,
        batch_size=16,
        log_every=16,
        validate_images=32,
        pictures=4,
        checkpoint_every=32,
        validate_every=32,
        keep=2,
    )
    c.sampler.update(steps=3, batch_size=8)
    c.mesh.min_size = 2**10
    return c
