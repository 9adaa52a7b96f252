"""The gradient of an autoencoder's step: one forward pass, and a backward pass for each thing that is asked of it.

    forward: params -> (y, l_1(z), l_2(z), ...)              the reconstruction and each term of the latents
    pull: (dy, dl_1, dl_2, ...) -> d params                  its vector-Jacobian product

Balanced weights need gradients of single terms at one kernel, before the weighted sum is differentiated. Of each `pull` XLA keeps only
what its result depends on: for a weight balanced at the decoder's last kernel the gradient of that kernel, for one balanced at
the encoder's a backward pass through the decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.models import vq
from ldm_jax.training.images import from_uint8, psnr
from ldm_jax.training.state import TrainState
from ldm_jax.training.step import Finish, Grad
from ldm_jax.training.tasks.autoencoder.latent import Latent, last_kernel
from ldm_jax.training.tasks.autoencoder.settings import Settings
from ldm_jax.training.terms import reconstruction
from ldm_jax.training.terms.term import Seen, Term, balanced


def errors(
    terms: Sequence[Term], weights: Mapping[str, Any], frozen: Any, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(E f32[B], each of its terms f32[B] by name) of images and reconstructions f32[B, H, W, 3]; `weights` by the terms' names."""
    seen = Seen(x, y=y)
    rows = {term.name: term.loss(None, frozen.get(term.name), seen) for term in terms if term.of == "error"}
    return sum(weights[name] * row for name, row in rows.items()), rows


def gradient(
    settings: Settings,
    terms: Sequence[Term],
    encode: Callable[[Any, jax.Array, jax.Array | None], Latent],
    decode: Callable[[Any, jax.Array], jax.Array],
    codes: int,
) -> Grad:
    """The gradient function for make_step: grads of the autoencoder and of each network of a term, at the parameters before the step.

    encode(variables, x, key), decode(variables, z): of the autoencoder, whose variables are {'params': ...}; `codes`: entries of its
    codebook, 0 for none. The metric 'loss' is the whole loss.
    """
    of_latent, of_image = ([term for term in terms if term.of == kind] for kind in ("latent", "image"))
    trained = ["autoencoder", *(term.network for term in of_latent if term.network)]

    def grad(params, state, frozen, batch, key):
        x = from_uint8(batch["image"])
        weights = {term.name: term.weight_at(state.step) for term in terms}

        def forward(params):
            parts = params["autoencoder"].items()
            variables = {
                "params": {
                    name: jax.lax.stop_gradient(part) if settings.is_still(name) else part for name, part in parts
                }
            }
            latent = encode(variables, x, key)
            seen = Seen(
                x, key, state.variables, z=latent.z, decode=lambda z: decode(variables, z), penalties=latent.penalties
            )
            values = {
                term.name: jnp.mean(term.loss(params.get(term.network), frozen.get(term.name), seen))
                for term in of_latent
            }
            return {"y": decode(variables, latent.z), **values}, latent

        def nll(y, variance):
            total, rows = errors(terms, weights, frozen, x, y)
            total, values = jnp.mean(total), {name: jnp.mean(row) for name, row in rows.items()}
            if settings.learned_variance:
                total = reconstruction.nll(variance, total)
                values["log_variance"] = variance["log_variance"]
            return total, values

        out, pullback, latent = jax.vjp(forward, {name: params[name] for name in trained}, has_aux=True)
        y = out.pop("y")
        zeros = jax.tree.map(jnp.zeros_like, {"y": y, **out})

        def pull(**cotangents):
            return pullback(zeros | cotangents)[0]

        def balance(half, **cotangents):
            kernels = [last_kernel(pull(**c)["autoencoder"][half]) for c in ({"y": to_y}, cotangents)]
            return balanced(*kernels)

        (total, metrics), (to_y, to_variance) = jax.value_and_grad(nll, argnums=(0, 1), has_aux=True)(
            y, params.get("error")
        )
        metrics |= out | {"psnr": jnp.mean(psnr(x, y))}
        grads, variables = {}, {}
        if settings.learned_variance:
            grads["error"] = to_variance

        # --- terms of the latent ---
        for term in of_latent:
            if term.balance:
                weights[term.name] *= balance(term.balance, **{term.name: jnp.ones(())})
        total += sum((weights[term.name] * out[term.name] for term in of_latent if not term.balance), jnp.zeros(()))
        total += sum((weights[term.name] * out[term.name] for term in of_latent if term.balance), jnp.zeros(()))

        # --- terms of the reconstruction, each with a network that is trained beside ---
        to_y_of_all = to_y
        for term in of_image:
            network = params.get(term.network)

            def value_of(y, term=term, network=network):
                return term.loss(network, frozen.get(term.name), Seen(x, key, state.variables, y=y))

            value, to_y_of_term = jax.value_and_grad(value_of)(y)
            if term.balance:
                weights[term.name] *= balance(term.balance, y=to_y_of_term)
            total += weights[term.name] * value
            to_y_of_all += weights[term.name] * to_y_of_term
            metrics |= {f"{term.name}_loss": value, f"{term.name}_weight": weights[term.name]}
            if term.opponent:
                opponent = jax.grad(term.opponent, has_aux=True)
                grads[term.network], (of_opponent, changed) = opponent(network, state.variables, x, y)
                metrics, variables = metrics | of_opponent, variables | changed

        grads |= pull(y=to_y_of_all, **{term.name: weights[term.name] for term in of_latent})
        metrics["loss"] = total
        if latent.indices is not None:
            metrics["codebook_usage"], metrics["codebook_perplexity"] = vq.usage(latent.indices, codes)
        if settings.by_average:
            metrics |= {"latents": latent.z, "indices": latent.indices}
        return grads, metrics, variables

    return grad


def follow(settings: Settings) -> Finish:
    """What sets the codebook after the gradients of a step: its entries follow the latents of the whole batch.

    The entries are averages already. An EMA of a revived entry would lie between its old place and its new one, near no latent.
    Therefore the EMAs of the parameters take the entries as they are.
    """

    def finish(state: TrainState, rows: dict[str, jax.Array], key: jax.Array):
        book, entries = vq.update(
            state.variables["codebook"],
            rows["latents"],
            rows["indices"],
            jax.random.fold_in(key, 2),
            settings.codebook_decay,
            settings.revive_after,
        )
        return {"codebook": book}, {"autoencoder": {"quantize": {"embedding": entries}}}

    return finish
