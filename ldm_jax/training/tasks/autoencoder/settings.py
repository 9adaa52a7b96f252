"""The keys of config.task of an autoencoder that are no blocks, with their defaults, and what they must satisfy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.models.autoencoder_kl import AutoencoderKL
from ldm_jax.models.vq import VQModel
from ldm_jax.training.tasks.autoencoder.latent import KINDS
from ldm_jax.training.terms import TERMS, reconstruction

# What is trained: everything, or these parts of the autoencoder while the others stay as they are (for latents that exist already).
TRAIN: dict[str, tuple[str, ...] | None] = {"all": None, "decoder": ("decoder", "post_quant_conv")}


class Settings(NamedTuple):
    """See `make` for what the keys mean; `blocks` are those of terms.TERMS."""

    reconstruction: str
    learned_variance: bool
    kl_weight: float
    kl_warmup_images: int
    commitment: float
    codebook_decay: float
    revive_after: int
    equivariance: float
    train: str
    blocks: dict[str, Mapping[str, Any]]

    @property
    def by_average(self) -> bool:
        """Whether the codebook follows its latents by an average, in the place of a gradient."""
        return self.codebook_decay > 0

    def is_still(self, part: str) -> bool:
        """Whether a part of the autoencoder's parameters gets no gradient."""
        kept = TRAIN[self.train]
        return (kept is not None and part not in kept) or (self.by_average and part == "quantize")


def parse(network: Any, kl_weight: float | None, commitment: float | None, **keys: Any) -> Settings:
    """The settings for a network. Raises ValueError naming the key of config.task that is off."""
    if type(network) not in KINDS:
        names = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"the task autoencoder trains {names}; config.model.name is a {type(network).__name__}")
    of_one_kind = (
        (AutoencoderKL, "kl_weight", kl_weight),
        (AutoencoderKL, "kl_warmup_images", keys["kl_warmup_images"] or None),
        (VQModel, "commitment", commitment),
    )
    for kind, key, value in of_one_kind:
        if value is not None and not isinstance(network, kind):
            raise ValueError(f"task.{key} is {value}, which does nothing for a {type(network).__name__}")
    blocks = {name: block for name, block in keys.pop("blocks").items() if block}
    s = Settings(
        kl_weight=1e-6 if kl_weight is None else kl_weight,
        commitment=0.25 if commitment is None else commitment,
        blocks=blocks,
        **keys,
    )
    for key, table in (("reconstruction", reconstruction.ERRORS), ("train", TRAIN)):
        if getattr(s, key) not in table:
            raise ValueError(f"task.{key} is {getattr(s, key)!r}; there are {', '.join(table)}")
    for name in blocks:
        if name not in TERMS:
            raise ValueError(f"task.{name} is unknown; the terms that have a block are {', '.join(TERMS)}")
    for key in ("kl_weight", "kl_warmup_images", "commitment", "codebook_decay", "revive_after", "equivariance"):
        if getattr(s, key) < 0:
            raise ValueError(f"task.{key} is {getattr(s, key)}; expected at least 0")
    if s.by_average and (not isinstance(network, VQModel) or s.train != "all" or s.codebook_decay >= 1):
        raise ValueError(
            f"task.codebook_decay is {s.codebook_decay}, with task.train={s.train!r} and a {type(network).__name__}; expected a "
            "number below 1, for the codebook of a VQModel that is trained"
        )
    if "align" in blocks and s.train != "all":
        raise ValueError(f"task.train is {s.train!r} with task.align, which moves the encoder; expected one of the two")
    if s.revive_after and not s.by_average:
        raise ValueError(
            f"task.revive_after is {s.revive_after}, but task.codebook_decay is 0; expected one above 0 with it"
        )
    return s
