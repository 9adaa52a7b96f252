"""VQModel against diffusers', with the same random weights: outputs, losses, gradients through the codebook,
tensors; and the averaged codebook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import VQModel as Original

from ldm_jax import weights
from ldm_jax.models import vq
from ldm_jax.models.vq import VQModel
from ldm_jax.weights.vq import VQ

pytestmark = pytest.mark.oracle

CONFIGS = {
    "f2": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "latent_channels": 3,
        "num_vq_embeddings": 32,
    },
    "f4_codes_of_five": {
        "block_out_channels": (4, 8, 8),
        "norm_num_groups": 2,
        "layers_per_block": 2,
        "latent_channels": 4,
        "vq_embed_dim": 5,
        "num_vq_embeddings": 50,
        "act_fn": "gelu",
        "lookup_from_codebook": True,
    },
    "grey_attention_at_a_level": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "latent_channels": 2,
        "num_vq_embeddings": 16,
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "mid_block_add_attention": False,
    },
}


def pair(name: str) -> tuple[torch.nn.Module, VQModel, dict]:
    config = CONFIGS[name]
    torch.manual_seed(0)
    levels = len(config["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    original = Original(**{**types, **config})
    for parameter in original.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    # As far apart as the latents are: otherwise one entry is the nearest to all of them.
    original.quantize.embedding.weight.data += 0.5 * torch.randn_like(original.quantize.embedding.weight)
    state = {k: v.detach().numpy() for k, v in original.state_dict().items()}
    module = VQ.module(original.config)
    return original, module, weights.from_state(module, state)


def images(name: str, seed: int) -> np.ndarray:
    channels = CONFIGS[name].get("in_channels", 3)
    return np.random.default_rng(seed).uniform(-1, 1, (2, 16, 24, channels)).astype(np.float32)


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal(name):
    original, ours, params = pair(name)
    x = images(name, 0)
    with torch.no_grad():
        latents = original.encode(nchw(x)).latents
        expected = original.quantize(latents)
        decoded = original.decode(latents)
        unquantized = torch.tensor(np.random.default_rng(1).normal(size=latents.shape).astype(np.float32))
        lookup = CONFIGS[name].get("lookup_from_codebook", False)
        source, shape = unquantized, None
        if lookup:
            source, shape = expected[2][2], (2, *latents.shape[2:], latents.shape[1])
        plain = original.decode(source, force_not_quantize=True, shape=shape).sample

    @jax.jit
    def run(params, x, z):
        variables = {"params": params}
        encoded = ours.apply(variables, x, method="encode")
        image, quantized = ours.apply(variables, x)
        z = quantized.indices if lookup else z
        # decode itself quantizes.
        again = ours.apply(variables, encoded, method="decode")
        return encoded, quantized, image, again, ours.apply(variables, z, True, method="decode")

    encoded, quantized, image, again, ours_plain = run(params, x, unquantized.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(encoded, latents.permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(again, decoded.sample.permute(0, 2, 3, 1), atol=1e-5)
    assert len(np.unique(quantized.indices)) > 3
    np.testing.assert_array_equal(np.ravel(quantized.indices), expected[2][2])
    np.testing.assert_allclose(quantized.z, expected[0].permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(
        (quantized.commitment + 0.25 * quantized.codebook).mean(), decoded.commit_loss, rtol=1e-5
    )
    np.testing.assert_allclose(image, decoded.sample.permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(ours_plain, plain.permute(0, 2, 3, 1), atol=1e-5)
    back = weights.to_state(ours, params)
    state = original.state_dict()
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value.numpy(), key)


def test_gradients_equal():
    """Of reconstruction and the loss of van den Oord et al., both in the training form: straight through the codebook."""
    original, ours, params = pair("f2")
    original.quantize.legacy = False
    x = images("f2", 2)
    result = original.train()(nchw(x))
    ((result.sample - nchw(x)).square().mean() + result.commit_loss).backward()
    expected = weights.from_state(ours, {k: p.grad.numpy() for k, p in original.named_parameters()})

    def loss(params):
        image, quantized = ours.apply({"params": params}, x)
        return jnp.square(image - x).mean() + quantized.loss(0.25).mean()

    got = jax.jit(jax.grad(loss))(params)
    assert np.abs(expected["quantize"]["embedding"]).max() > 1e-3
    # A bias of all keys changes no attention: its gradient is rounding alone.
    floor = 1e-3 * max(np.abs(e).max() for e in jax.tree.leaves(expected))
    for (path, e), g in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        assert np.abs(g - e).max() < 1e-4 * max(np.abs(e).max(), floor), jax.tree_util.keystr(path)


def test_averages_equal():
    """Of appendix A.1 with the smoothed counts, in torch and float64, over ten batches; one entry is never chosen."""
    random = np.random.default_rng(0)
    codes = random.normal(size=(6, 4)).astype(np.float32)
    count, total = torch.ones(6, dtype=torch.float64), torch.tensor(codes).double()
    book = vq.codebook(jnp.asarray(codes))
    step = jax.jit(vq.update)
    for _ in range(10):
        z = random.normal(size=(2, 3, 4, 4)).astype(np.float32)
        indices = random.integers(0, 5, (2, 3, 4)).astype(np.int32)
        chosen = torch.nn.functional.one_hot(torch.tensor(indices).flatten().long(), 6).double()
        count = 0.8 * count + 0.2 * chosen.sum(0)
        total = 0.8 * total + 0.2 * chosen.T @ torch.tensor(z).double().reshape(-1, 4)
        expected = total / ((count + 1e-5) / (count.sum() + 6 * 1e-5) * count.sum())[:, None]
        book, codes = step(book, z, indices, jax.random.key(0), 0.8)
        np.testing.assert_allclose(book.count, count, rtol=1e-5)
        np.testing.assert_allclose(book.total, total, atol=1e-5)
        np.testing.assert_allclose(codes, expected, atol=1e-5)


def test_trained_by_averages_it_loads_there(tmp_path):
    """Three steps of an encoder and a codebook that is averaged and revived, then written: the tensors, and the entries chosen."""
    _, ours, params = pair("f2")
    x = images("f2", 3)
    start = np.asarray(params["quantize"]["embedding"])

    @jax.jit
    def step(params, book, key):
        def loss(params):
            z = ours.apply({"params": params}, x, method="encode")
            quantized = ours.apply({"params": params}, z, method="quantized")
            return quantized.commitment.mean(), (z, quantized.indices)

        grads, (z, indices) = jax.grad(loss, has_aux=True)(params)
        book, embedding = vq.update(book, z, indices, key, 0.9, 4)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params | {"quantize": {"embedding": embedding}}, book, indices

    book = vq.codebook(jnp.asarray(start))
    for i in range(3):
        params, book, _ = step(params, book, jax.random.key(i))
    assert (np.abs(params["quantize"]["embedding"] - start).max(1) > 1e-3).all()
    weights.save(tmp_path, ours, params)
    theirs = Original.from_pretrained(tmp_path)
    mine = weights.to_state(ours, params)
    assert mine.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        np.testing.assert_array_equal(mine[key], value.numpy(), key)
    with torch.no_grad():
        chosen = theirs.quantize(theirs.encode(nchw(x)).latents)[2][2]
    # The next step chooses before it updates anything.
    indices = step(params, book, jax.random.key(3))[2]
    assert len(np.unique(indices)) > 3
    np.testing.assert_array_equal(np.ravel(indices), chosen)


def test_config():
    for name in CONFIGS:
        original, ours, _ = pair(name)
        assert VQ.module(VQ.config(ours)) == ours
        assert {k: original.config[k] for k in VQ.config(ours)} == VQ.config(ours)
    with pytest.raises(ValueError, match="VQModel: norm_type is 'spatial', expected 'group'"):
        VQ.module({"norm_type": "spatial"})
    with pytest.raises(ValueError, match="VQModel: option norm_kind"):
        VQ.module({"norm_kind": "group"})
