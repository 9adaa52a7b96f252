"""First stage: an autoencoder, alone or against a discriminator (Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021).

    error = |x - y|_p + w_p perceptual(x, y),   y = decode(z)
    nll   = error exp(-s) + s                                           s learned, or 0
    loss  = nll + penalty(z) + w_g |grad_L nll| / |grad_L g| g          g the adversarial loss of y (training/adversarial.py)

    autoencoder    z                                  penalty(z)
    KL             mean + exp(logvar / 2) eps         kl_weight KL(N(mean, exp(logvar)) || N(0, 1))       Kingma & Welling 2014
    VQ             before quantization                |sg(z) - e|^2 + commitment |z - sg(e)|^2           van den Oord et al. 2017
    FSQ, tiny      before rounding; z                 none

and, where asked for, an equivariance and an alignment of the latents (training/equivariance.py, alignment.py). The error is a mean
over pixels and channels; the KL is a sum over the latent divided by the number of pixel values, so that `kl_weight` keeps its meaning
at any resolution. Images enter as u8 and are used in [-1, 1].

The discriminator's step is taken beside the autoencoder's, on x and the same y, both from the parameters before the step; the
published code takes it after, on a y made anew.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldm_jax.models import vq
from ldm_jax.models.autoencoder_kl import AutoencoderKL
from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.fsq import FSQModel
from ldm_jax.training import adversarial as games
from ldm_jax.training import alignment as alignments
from ldm_jax.training import state as states
from ldm_jax.training.equivariance import equivariance as equivariance_error
from ldm_jax.training.images import from_uint8
from ldm_jax.training.perceptual import Perceptual

RECONSTRUCTIONS = {
    "l1": lambda error: jnp.abs(error),
    "l2": lambda error: jnp.square(error),
    "charbonnier": lambda error: jnp.sqrt(jnp.square(error) + 1e-4),
}
# What is trained: everything, or these parts of the autoencoder with the rest as it was (for latents that exist already).
TRAIN = {"all": None, "decoder": ("decoder", "post_quant_conv")}


class Latent(NamedTuple):
    """z f32[B, h, w, D] as `decode` takes it, its penalties f32[B] by name, and with a codebook indices i32[B, h, w]."""

    z: jax.Array
    penalties: dict[str, jax.Array]
    indices: jax.Array | None


def _gaussian(network: AutoencoderKL, variables: Any, x: jax.Array, key: jax.Array | None) -> Latent:
    posterior = network.apply(variables, x, method="encode")
    z = posterior.mean if key is None else posterior.sample(key)
    return Latent(z, {"kl": posterior.kl() / x[0].size}, None)


def _quantized(network: vq.VQModel | FSQModel, variables: Any, x: jax.Array, key: jax.Array | None) -> Latent:
    z = network.apply(variables, x, method="encode")
    found = network.apply(variables, z, method="quantized")
    losses = {"codebook": found.codebook, "commitment": found.commitment} if isinstance(network, vq.VQModel) else {}
    return Latent(z, losses, found.indices)


def _certain(network: AutoencoderTiny, variables: Any, x: jax.Array, key: jax.Array | None) -> Latent:
    return Latent(network.apply(variables, x, method="encode"), {}, None)


# encode(network, {'params': ...}, x, key) -> Latent; without a key the posterior's mean, as latents are used later.
ENCODE: dict[type, Callable[[Any, Any, jax.Array, jax.Array | None], Latent]] = {
    AutoencoderKL: _gaussian,
    AutoencoderTiny: _certain,
    FSQModel: _quantized,
    vq.VQModel: _quantized,
}


def last_kernel(half: Mapping[str, Any]) -> jax.Array:
    """The kernel of the last convolution of an encoder's or decoder's parameters."""
    name = "conv_out" if "conv_out" in half else max(half, key=lambda name: int(name.rpartition("_")[2]))
    return half[name]["kernel"]


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (clipped, as they are looked at): f32[B]."""
    error = jnp.mean(jnp.square(jnp.clip(x, -1, 1) - jnp.clip(y, -1, 1)), axis=(1, 2, 3))
    return 10 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))


def make(
    *,
    network: Any,
    optimizer: Callable[..., optax.GradientTransformation],
    schedule: Any,
    averages: states.Averages,
    batch_size: int,
    resolution: int,
    accumulate: int = 1,
    reconstruction: str = "l1",
    learned_variance: bool = False,
    kl_weight: float | None = None,
    kl_warmup_images: int = 0,
    commitment: float | None = None,
    codebook_decay: float = 0.0,
    revive_after: int = 0,
    equivariance: float = 0.0,
    perceptual: Perceptual | None = None,
    align: alignments.Alignment | None = None,
    adversarial: Mapping[str, Any] | None = None,
    train: str = "all",
) -> states.Task:
    """Task that trains `network` (encode, decode) under the name 'autoencoder'. Batches: {'image': u8[B, H, W, 3]}.

    `optimizer(start_images=0, **overrides)` is the run's optimizer, with the overrides the discriminator's, whose schedule begins at
    `start_images` and ends with the run.

    `reconstruction`: a name in RECONSTRUCTIONS. `learned_variance`: learn s, as the network 'error'. KL: `kl_weight` (1e-6) is
    reached in a straight line over `kl_warmup_images`. VQ: `commitment` (0.25); with a `codebook_decay` above 0 the codebook follows
    its latents by an average, in the place of the gradient, and an entry that no one of `revive_after` images chose is drawn anew
    (0: never; models/vq.py). `equivariance`: weight of that term. `adversarial`: the keys of games.Adversarial, or nothing for none;
    adds the network 'discriminator', whose averages are kept like the others'. `train`: 'all', or 'decoder' with the rest left bit
    for bit.

    The metric 'loss' is the whole loss; validation's has neither s nor the adversarial term. Raises ValueError naming the key of
    config.task that is off.
    """
    if type(network) not in ENCODE:
        known = ", ".join(kind.__name__ for kind in ENCODE)
        raise ValueError(f"the task autoencoder trains {known}; config.model.name is a {type(network).__name__}")
    for what, name, known in (("reconstruction", reconstruction, RECONSTRUCTIONS), ("train", train, TRAIN)):
        if name not in known:
            raise ValueError(f"task.{what} is {name!r}; there are {', '.join(known)}")
    for kind, keys in (
        (AutoencoderKL, {"kl_weight": kl_weight, "kl_warmup_images": kl_warmup_images or None}),
        (vq.VQModel, {"commitment": commitment}),
    ):
        for what, value in keys.items():
            if value is not None and not isinstance(network, kind):
                raise ValueError(f"task.{what} is {value}, which does nothing for a {type(network).__name__}")
    kl_weight, commitment = 1e-6 if kl_weight is None else kl_weight, 0.25 if commitment is None else commitment
    least = {"kl_weight": kl_weight, "kl_warmup_images": kl_warmup_images, "commitment": commitment}
    least |= {"codebook_decay": codebook_decay, "revive_after": revive_after, "equivariance": equivariance}
    for what, value in least.items():
        if value < 0:
            raise ValueError(f"task.{what} is {value}; expected at least 0")
    by_average = codebook_decay > 0
    if by_average and (not isinstance(network, vq.VQModel) or train != "all" or codebook_decay >= 1):
        raise ValueError(
            f"task.codebook_decay is {codebook_decay}, with task.train={train!r} and a {type(network).__name__}; expected a "
            "number below 1, for the codebook of a VQModel that is trained"
        )
    if align and train != "all":
        raise ValueError(f"task.train is {train!r} with task.align, which moves the encoder; expected one of the two")
    if revive_after and not by_average:
        raise ValueError(
            f"task.revive_after is {revive_after}, but task.codebook_decay is 0; expected one above 0 with it"
        )
    game = games.Adversarial(**adversarial) if adversarial else None
    if game:
        games.check(game)
        if accumulate > 1:
            raise ValueError(
                f"config.train.accumulate={accumulate} with task.adversarial; expected 1: a batch norm's statistics and the "
                "adaptive weight are those of the whole batch"
            )
        judge = PatchDiscriminator(game.width, game.layers, game.norm, network.dtype)
        first = math.ceil(game.start_images / batch_size)  # step of the first adversarial loss

    if perceptual:
        x = jnp.zeros((1, resolution, resolution, 3))
        jax.eval_shape(perceptual.distance, perceptual.params, x, x)  # says what is wrong with the resolution
    encode, distance = functools.partial(ENCODE[type(network)], network), RECONSTRUCTIONS[reconstruction]
    penalty_weights = {"kl": kl_weight, "codebook": 0.0 if by_average else 1.0, "commitment": commitment}

    def decode(variables, z):
        return network.apply(variables, z, method="decode")

    # --- what moves by which optimizer ---

    def still(name):
        return (train != "all" and name not in TRAIN[train]) or (by_average and name == "quantize")

    def labels(params):
        return {name: "still" if still(name) else "moves" for name in params}

    own = optimizer()
    if train != "all" or by_average:
        # Not a gradient of 0: weight decay would move them.
        own = optax.partition({"moves": own, "still": optax.set_to_zero()}, labels)
    optimizers = {"autoencoder": own}
    if learned_variance:
        optimizers["error"] = optimizer()
    if align:
        optimizers["align"] = optimizer()
    if game:
        # Not a loss of 0: Adam's moments would count steps without a gradient.
        optimizers["discriminator"] = optax.conditionally_mask(
            optimizer(start_images=game.start_images, **game.optimizer), lambda step: step >= first
        )

    def init(key):
        k_params, k_state = jax.random.split(key)
        x = jnp.zeros((1, resolution, resolution, 3))
        params, variables = {"autoencoder": network.init(k_params, x)["params"]}, {}
        if learned_variance:
            params["error"] = {"log_variance": jnp.zeros(())}
        if align:
            z = encode({"params": params["autoencoder"]}, x, None).z
            features = jax.eval_shape(lambda x: align.features(align.params, x, z.shape[1]), x)
            params["align"] = alignments.init(jax.random.fold_in(k_params, 1), z.shape[-1], features.shape[-1])
        if game:
            params["discriminator"], variables = games.init(game, judge, jax.random.fold_in(k_params, 2), x)
        if by_average:
            variables["codebook"] = vq.codebook(jnp.copy(params["autoencoder"]["quantize"]["embedding"]))
        return states.create(k_state, params, optimizers, averages, variables)

    def error(frozen, x, y):
        """(error f32[B], its parts by name f32[B])."""
        parts = {"reconstruction": jnp.mean(distance(x - y), axis=(1, 2, 3))}
        total = parts["reconstruction"]
        if perceptual:
            parts["perceptual"] = perceptual.distance(frozen["perceptual"], x, y)
            total += perceptual.weight * parts["perceptual"]
        return total, parts

    # --- the gradient of a step ---

    def gradients(params, batch, key, *, frozen, variables, step):
        x = from_uint8(batch["image"])
        now = dict(penalty_weights)
        if kl_warmup_images:
            now["kl"] *= jnp.minimum(1.0, step.astype(jnp.float32) * batch_size / kl_warmup_images)

        def forward(params):
            whole = params["autoencoder"]
            own = {
                "params": {name: jax.lax.stop_gradient(part) if still(name) else part for name, part in whole.items()}
            }
            latent = encode(own, x, key)
            found = {name: jnp.mean(value) for name, value in latent.penalties.items()}
            out = {"penalty": sum((now[name] * value for name, value in found.items()), jnp.zeros(()))}
            if equivariance:
                k_tau = jax.random.fold_in(key, 1)
                found["equivariance"] = equivariance_error(functools.partial(decode, own), distance, x, latent.z, k_tau)
                out["penalty"] += equivariance * found["equivariance"]
            if align:
                features = align.features(frozen["align"], x, latent.z.shape[1])
                out["align"] = found["align"] = alignments.loss(params["align"], latent.z, features)
            return {"y": decode(own, latent.z), **out}, (latent, found)

        def nll(y, spread):
            total, parts = error(frozen, x, y)
            total, found = jnp.mean(total), {name: jnp.mean(value) for name, value in parts.items()}
            if learned_variance:
                s = found["log_variance"] = spread["log_variance"]
                total = total * jnp.exp(-s) + s
            return total, found

        # One forward pass; each pull below is a backward pass of which XLA keeps what its result depends on: of the two for the
        # adversarial weight the gradient of the decoder's last kernel, of that for the alignment's the decoder once more.
        trained = {name: params[name] for name in ("autoencoder", "align") if name in params}
        out, pullback, (latent, metrics) = jax.vjp(forward, trained, has_aux=True)
        y = out["y"]

        def pull(**to):
            return pullback({name: to.get(name, jnp.zeros_like(value)) for name, value in out.items()})[0]

        (total, found), (to_y, to_spread) = jax.value_and_grad(nll, argnums=(0, 1), has_aux=True)(
            y, params.get("error")
        )
        metrics |= found | {"psnr": jnp.mean(psnr(x, y))}
        total += out["penalty"]
        one = jnp.ones(())
        grads, carried, weights = {}, {}, {"penalty": one}
        if learned_variance:
            grads["error"] = to_spread
        if align:
            each = [last_kernel(pull(**to)["autoencoder"]["encoder"]) for to in ({"y": to_y}, {"align": one})]
            weights["align"] = align.weight * games.adaptive_weight(*each)
            total += weights["align"] * out["align"]
        if game:

            def fool(y):
                fake, _ = games.logits(judge, params["discriminator"], variables["discriminator"], y)
                return games.generator_loss(game.loss, fake)

            fooled, to_fool = jax.value_and_grad(fool)(y)
            weight = jnp.where(step >= first, game.weight, 0.0)
            if game.adaptive:
                each = [last_kernel(pull(y=to)["autoencoder"]["decoder"]) for to in (to_y, to_fool)]
                weight *= games.adaptive_weight(*each)
            total += weight * fooled
            to_y += weight * to_fool
            judged = jax.grad(functools.partial(games.discriminator_loss, game, judge), has_aux=True)
            grads["discriminator"], (found, carried) = judged(params["discriminator"], variables, x, y)
            metrics |= found | {"adversarial_loss": fooled, "adversarial_weight": weight}
        grads |= pull(y=to_y, **weights)
        if latent.indices is not None:
            share, perplexity = vq.usage(latent.indices, network.num_vq_embeddings)
            metrics |= {"codebook_usage": share, "codebook_perplexity": perplexity}
        if by_average:
            carried["latents"] = latent.z, latent.indices
        return grads, ({"loss": total, **metrics}, carried)

    def step(state, frozen, batch):
        key = states.step_key(state)
        grad = functools.partial(gradients, frozen=frozen, variables=state.variables, step=state.step)
        grads, (metrics, carried) = states.accumulated(grad, state.params, batch, key, accumulate)
        if by_average:
            whole = state.params["autoencoder"]
            book, chosen = state.variables["codebook"], carried.pop("latents")
            carried["codebook"], entries = vq.update(
                book, *chosen, jax.random.fold_in(key, 2), codebook_decay, revive_after
            )
            # Before the averages of the parameters are taken.
            whole = whole | {"quantize": {"embedding": entries}}
            state = state._replace(params=state.params | {"autoencoder": whole})
        metrics["learning_rate"] = schedule(state.step)
        state = state._replace(variables=state.variables | carried)
        state, norms = states.apply_gradients(state, grads, optimizers, averages, batch_size)
        if by_average:
            # An average already: one of a revived entry would lie between where it was and where it is, at no latent.
            entries = state.params["autoencoder"]["quantize"]
            state = state._replace(
                ema={
                    h: nets | {"autoencoder": nets["autoencoder"] | {"quantize": entries}}
                    for h, nets in state.ema.items()
                }
            )
        return state, metrics | norms

    # --- what is looked at: reconstructions of the posterior's mean, as it is used later ---

    def validate(params, frozen, batch, key):
        del key
        x, own = from_uint8(batch["image"]), {"params": params["autoencoder"]}
        latent = encode(own, x, None)
        y = decode(own, latent.z)
        total, parts = error(frozen, x, y)
        total += sum(penalty_weights[name] * value for name, value in latent.penalties.items())
        rows = {"loss": total, "psnr": psnr(x, y), **parts, **latent.penalties}
        if latent.indices is not None:
            share, perplexity = vq.usage(latent.indices, network.num_vq_embeddings)  # of this batch
            rows |= {
                "codebook_usage": jnp.full_like(total, share),
                "codebook_perplexity": jnp.full_like(total, perplexity),
            }
        return {f"val_{name}": value for name, value in rows.items()}

    def pictures(params, frozen, batch, key):
        del frozen, key
        x, own = from_uint8(batch["image"]), {"params": params["autoencoder"]}
        return {"data": x, "reconstructions": decode(own, encode(own, x, None).z)}

    others = {"perceptual": perceptual, "align": align}
    return states.Task(init, step, validate, pictures, {k: given.params for k, given in others.items() if given})
