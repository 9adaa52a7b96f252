"""First stage: an autoencoder, alone or against a discriminator (Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021).

    E    = |x - y|_p + w_p perceptual(x, y),   y = decode(z)
    nll  = E exp(-s) + s                                                s learned, or 0
    loss = nll + penalty(z) + w_g |grad_L nll| / |grad_L g| g           g the adversarial loss of y

and, where a config has them, an equivariance and an alignment of the latents. Each summand is a term (training/terms); how images
become latents is in latent.py, the keys of config.task in settings.py, the gradient in step.py. Images enter as u8 and are used in
[-1, 1].

The discriminator's step is taken beside the autoencoder's, on x and the same y, both from the parameters before the step. The
published code takes it after the autoencoder's, on a new y.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax import models
from ldm_jax.models import vq
from ldm_jax.training.images import from_uint8, psnr
from ldm_jax.training.state import create
from ldm_jax.training.step import make_step
from ldm_jax.training.task import Context, Figures, Kind, Task
from ldm_jax.training.tasks.autoencoder import settings, step
from ldm_jax.training.tasks.autoencoder.latent import KINDS
from ldm_jax.training.terms import TERMS, equivariance, penalty, reconstruction
from ldm_jax.training.terms.term import Seen
from ldm_jax.weights.tree_hash import tree_sha256


def make(
    context: Context,
    *,
    reconstruction: str = "l1",
    learned_variance: bool = False,
    kl_weight: float | None = None,
    kl_warmup_images: int = 0,
    commitment: float | None = None,
    codebook_decay: float = 0.0,
    revive_after: int = 0,
    equivariance: float = 0.0,
    train: str = "all",
    **blocks: dict | None,
) -> Task:
    """Task that trains `context.network` (encode, decode) under the name 'autoencoder'. Batches: {'image': u8[B, H, W, 3]}.

    `reconstruction`: a name in reconstruction.ERRORS. `learned_variance`: learn s, as the network 'error'. KL: `kl_weight` (1e-6) is
    reached in a straight line over `kl_warmup_images`. VQ: `commitment` (0.25); with a `codebook_decay` above 0 the codebook follows
    its latents by an average, in the place of the gradient, and an entry that none of `revive_after` images chose is drawn anew
    (0: never; models/vq.py). `equivariance`: weight of that term. `train`: 'all', or 'decoder', which leaves the rest bit
    for bit. `blocks`: keys of terms by their names in terms.TERMS; an empty one is none. A term may add a network, whose averages are
    kept like the others'.

    The metric 'loss' is the whole loss; validation's contains the errors and the penalties of the latents. Raises ValueError naming the
    key of config.task that is off.
    """
    s = settings.parse(
        context.network,
        kl_weight,
        commitment,
        reconstruction=reconstruction,
        learned_variance=learned_variance,
        kl_warmup_images=kl_warmup_images,
        codebook_decay=codebook_decay,
        revive_after=revive_after,
        equivariance=equivariance,
        train=train,
        blocks=blocks,
    )
    return build(context, s)


def build(context: Context, s: settings.Settings) -> Task:
    """The task of settings that fit the network."""
    network, space = context.network, context.space
    kind = KINDS[type(network)]
    encode = functools.partial(kind.encode, network)
    decode = functools.partial(network.apply, method="decode")

    # --- the terms of the loss ---
    weights = {"kl": s.kl_weight, "codebook": 0.0 if s.by_average else 1.0, "commitment": s.commitment}
    terms = [reconstruction.make(s.reconstruction)]
    terms += [penalty.make(name, weights[name], s.kl_warmup_images, context.batch_size) for name in kind.penalties]
    terms += [equivariance.make(s.equivariance, s.reconstruction)] if s.equivariance else []
    terms += [TERMS[name](context, **s.blocks[name]) for name in TERMS if name in s.blocks]
    terms = [term for term in terms if term is not None]  # None: nothing is read for a config that is only checked
    frozen = {term.name: term.frozen for term in terms if term.frozen is not None}

    # --- which optimizer moves what ---
    def labels(params):
        return {name: "still" if s.is_still(name) else "moves" for name in params}

    optimizers = {"autoencoder": context.optimizer()}
    if s.train != "all" or s.by_average:
        # Not a gradient of 0: weight decay would move them.
        moves = {"moves": optimizers["autoencoder"], "still": optax.set_to_zero()}
        optimizers["autoencoder"] = optax.partition(moves, labels)
    if s.learned_variance:
        optimizers["error"] = context.optimizer()
    optimizers |= {term.network: term.optimizer for term in terms if term.network}

    def init(key):
        k_params, k_state = jax.random.split(key)
        x = jnp.zeros((1, *space.shape))
        params, variables = {"autoencoder": models.init(network, k_params, space.shape)["params"]}, {}
        if s.learned_variance:
            params["error"] = reconstruction.init_variance()
        for term in terms:
            if term.network:
                z = encode({"params": params["autoencoder"]}, x, None).z
                params[term.network], added = term.init(k_params, x, z)
                variables |= added
        if s.by_average:
            variables["codebook"] = vq.codebook(jnp.copy(params["autoencoder"]["quantize"]["embedding"]))
        return create(k_state, params, optimizers, context.averages, variables)

    codes = getattr(network, "num_vq_embeddings", 0)
    grad = step.gradient(s, terms, encode, decode, codes)
    train_step = make_step(context, grad, optimizers, step.follow(s) if s.by_average else None)

    # --- what is looked at: reconstructions of the posterior's mean, as it is used later ---

    def validate(params, frozen, batch, key):
        del key
        x, variables = from_uint8(batch["image"]), {"params": params["autoencoder"]}
        latent = encode(variables, x, None)
        y = decode(variables, latent.z)
        total, rows = step.errors(terms, {term.name: term.weight for term in terms}, frozen, x, y)
        seen = Seen(x, z=latent.z, decode=lambda z: decode(variables, z), penalties=latent.penalties)
        costs = [term for term in terms if term.of == "latent" and term.validated]
        rows |= {term.name: term.loss(params.get(term.network), frozen.get(term.name), seen) for term in costs}
        total += sum(term.weight * rows[term.name] for term in costs)
        rows |= {"loss": total, "psnr": psnr(x, y)}
        if latent.indices is not None:
            of_batch = zip(("codebook_usage", "codebook_perplexity"), vq.usage(latent.indices, codes))
            rows |= {name: jnp.full_like(total, value) for name, value in of_batch}
        return {f"val_{name}": value for name, value in rows.items()}

    def pictures(params, frozen, batch, key):
        del frozen, key
        x, variables = from_uint8(batch["image"]), {"params": params["autoencoder"]}
        return {"data": x, "reconstructions": decode(variables, encode(variables, x, None).z)}

    facts = {name: tree_sha256(params, described=False) for name, params in frozen.items()}
    return Task(init, train_step, validate, pictures, frozen, facts)


def keeps_encoder(*, train: str = "all", **block: Any) -> bool:
    """Whether the encoder stays as it was: then the latents do, and every model of them goes on."""
    del block
    return train == "decoder"


FIGURES = Figures("reconstructed")
KIND = Kind(make, network="autoencoder", blocks=TERMS, figures=FIGURES, keeps_encoder=keeps_encoder)
