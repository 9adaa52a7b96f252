"""PatchDiscriminator against the same network of torch.nn layers: two steps of training and then evaluation, every norm."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ldm_jax.models.discriminator import PatchDiscriminator

pytestmark = pytest.mark.oracle

WIDTH, RATE = 4, 0.05
# Layers by norm; from the fourth on the width no longer grows.
LAYERS = {"batch": 2, "spectral": 1, "group": 2, "none": 4}
SHAPE = {"batch": (3, 12, 20, 3), "spectral": (2, 9, 8, 3), "group": (2, 12, 16, 3), "none": (2, 50, 66, 1)}


def twin(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    rows, channels, layers = OrderedDict(), SHAPE[norm][-1], LAYERS[norm]
    for i in range(layers + 2):
        inner = 0 < i <= layers
        features = WIDTH * min(2**i, 8) if i <= layers else 1
        conv = nn.Conv2d(channels, features, 4, 2 if i < layers else 1, 1, bias=not (norm == "batch" and inner))
        rows[f"conv_{i}"] = spectral_norm(conv) if norm == "spectral" else conv
        if norm == "batch" and inner:
            rows[f"norm_{i}"] = nn.BatchNorm2d(features)
        if norm == "group" and inner:
            rows[f"norm_{i}"] = nn.GroupNorm(features // 4, features)
        if i <= layers:
            rows[f"act_{i}"] = nn.LeakyReLU(0.2)
        channels = features
    network = nn.Sequential(rows)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer += torch.rand_like(buffer)
    return network


def ours(tensors: dict[str, torch.Tensor]) -> dict:
    """torch's names and layouts -> {'params': ..., 'state': ...}, or what of them the names are of."""
    tree = {}
    for name, tensor in tensors.items():
        value, layer = tensor.detach().numpy().copy(), name.partition(".")[0]
        params = tree.setdefault("params", {}).setdefault(layer, {})
        state = tree.setdefault("state", {}).setdefault(layer, {})
        if name.endswith("running_mean"):
            state["mean"] = value
        elif name.endswith("running_var"):
            state["var"] = value
        elif name.endswith("._u"):
            state.setdefault("vectors", {})["u"] = value
        elif name.endswith("._v"):
            state.setdefault("vectors", {})["v"] = value.reshape(-1, 4, 4).transpose(1, 2, 0).ravel()
        elif name.endswith("bias"):
            params["bias"] = value
        elif value.ndim == 4:
            params["kernel"] = value.transpose(2, 3, 1, 0)
        elif value.ndim == 1:
            params["scale"] = value
    return {kind: {k: v for k, v in part.items() if v} for kind, part in tree.items()}


def assert_close(got, expected, rtol, where):
    scale = max((np.abs(e).max() for e in jax.tree.leaves(expected)), default=0)
    for (path, e), g in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        where_ = f"{where} {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(g, e, rtol=0, atol=rtol * max(np.abs(e).max(), 1e-2 * scale), err_msg=where_)


@pytest.mark.parametrize("norm", LAYERS)
def test_equals_torch(norm):
    network, module = twin(norm), PatchDiscriminator(WIDTH, LAYERS[norm], norm)
    variables = ours(network.state_dict())
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (3, *SHAPE[norm])).astype(np.float32)

    @jax.jit
    def train(params, state, x, weight):
        """A weighted sum of logits and R1, whose gradient is one of second order."""

        def loss(params):
            def discriminate(x):
                variables = {"params": params, "state": state}
                return module.apply(variables, x, train=True, mutable=["state"])

            logits, pull, state_ = jax.vjp(discriminate, x, has_aux=True)
            return (weight * logits).sum() + jnp.square(pull(jnp.ones_like(logits))[0]).sum(), (logits, state_)

        return jax.grad(loss, has_aux=True)(params)

    params, state = variables["params"], variables["state"]
    shapes = jax.eval_shape(module.init, jax.random.key(0), x[0])
    assert jax.tree.map(np.shape, {"state": {}, **shapes}) == jax.tree.map(np.shape, variables)
    for images in x[:2]:
        theirs = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
        logits = network.train()(theirs)
        weight = torch.tensor(random.normal(size=logits.shape).astype(np.float32))
        slope = torch.autograd.grad(logits.sum(), theirs, create_graph=True)[0]
        network.zero_grad()
        ((weight * logits).sum() + slope.square().sum()).backward()

        grads, (got, new) = train(params, state, images, weight.permute(0, 2, 3, 1).numpy())
        state = new.get("state", {})
        assert got.std() > 1e-2, "the logits do not depend on the image"
        assert_close(got, logits.detach().permute(0, 2, 3, 1).numpy(), 1e-5, "logits")
        assert_close(state, ours(network.state_dict())["state"], 1e-5, "state")
        expected = ours({name: parameter.grad for name, parameter in network.named_parameters()})["params"]
        assert_close(grads, expected, 1e-4, "gradient")
        # The second round starts from kernels that the vectors of the power method have not seen.
        params = jax.tree.map(lambda p, g: p - RATE * g / (1 + np.abs(g).max()), params, expected)
        for parameter in network.parameters():
            parameter.data -= RATE * parameter.grad / (1 + parameter.grad.abs().max())

    with torch.no_grad():
        expected = network.eval()(torch.tensor(x[2]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    got = jax.jit(module.apply)({"params": params, "state": state}, x[2])
    assert_close(got, expected, 1e-5, "evaluation")
