"""One step of the first stage against torch's autograd, and what it trained in diffusers."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

from ldm_jax import weights
from ldm_jax.models import vq
from ldm_jax.models.autoencoder_kl import AutoencoderKL
from ldm_jax.sampling.model import Space, from_uint8
from ldm_jax.training.state import step_key
from ldm_jax.training.task import Context
from ldm_jax.training.tasks import autoencoder
from ldm_jax.training.terms import adversarial, alignment

pytestmark = pytest.mark.oracle

SIDE, BATCH = 16, 4
SHAPE = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, "mid_block_add_attention": False}
TYPES = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
IMAGES = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)


def random_everywhere(original):
    for parameter in original.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return {k: v.detach().numpy() for k, v in original.state_dict().items()}


def kl_pair():
    torch.manual_seed(0)
    original = diffusers.AutoencoderKL(latent_channels=2, **SHAPE, **TYPES)
    state = random_everywhere(original)
    module = AutoencoderKL(latent_channels=2, **SHAPE)
    return original, module, weights.from_state(module, state)


def vq_pair():
    torch.manual_seed(0)
    original = diffusers.VQModel(latent_channels=3, num_vq_embeddings=16, **SHAPE, **TYPES)
    original.quantize.embedding.weight.data += 0.5 * torch.randn_like(original.quantize.embedding.weight)
    state = random_everywhere(original)
    module = vq.VQModel(latent_channels=3, num_vq_embeddings=16, **SHAPE)
    return original, module, weights.from_state(module, state)


def descent(start_images=0, **overrides):
    """A step of it takes the gradient off the parameters."""
    assert not overrides or overrides == {"learning_rate": 2.0}
    return optax.sgd(overrides.get("learning_rate", 1.0))


class Pooled:
    """A stand-in for LPIPS that both libraries have: squares of differences of means over 4 x 4 pixels, weighted by channel."""

    @staticmethod
    def apply(variables, x, y):
        error = (x - y).reshape(len(x), SIDE // 4, 4, SIDE // 4, 4, 3).mean((2, 4))
        return (variables["params"] * jnp.square(error)).mean((1, 2, 3))


CHANNELS = np.array([0.5, 2.0, 1.0], np.float32)


def discriminate(params, norm, x):
    """The discriminator in torch, on parameters as ours are called; training mode."""
    for i in range(len([name for name in params if name.startswith("conv")])):
        layer = params[f"conv_{i}"]
        last = f"conv_{i + 1}" not in params
        stride = 1 if last or f"conv_{i + 2}" not in params else 2
        x = F.conv2d(x, layer["kernel"].permute(3, 2, 0, 1), layer.get("bias"), stride, 1)
        if norm == "batch" and f"norm_{i}" in params:
            layer = params[f"norm_{i}"]
            x = F.batch_norm(x, None, None, layer["scale"], layer["bias"], training=True)
        x = x if last else F.leaky_relu(x, 0.2)
    return x


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def to_torch(tree):
    return jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), tree)


def make(module, **settings):
    context = Context(
        network=module,
        optimizer=descent,
        schedule=lambda step: 1.0,
        batch_size=BATCH,
        space=Space((SIDE, SIDE, 3)),
        load=lambda name: (Pooled, jnp.asarray(CHANNELS)),
    )
    return autoencoder.make(context, **settings)


def one_step(module, params, **settings):
    """State before and after one step, and its metrics, of descent from these parameters and a random discriminator."""
    task = make(module, **settings)
    state = jax.jit(task.init)(jax.random.key(1))
    start = dict(state.params, autoencoder=params)
    if "error" in start:
        start["error"] = {"log_variance": jnp.float32(-0.7)}
    if "discriminator" in start:
        keys = iter(jax.random.split(jax.random.key(2), 100))
        start["discriminator"] = jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), start["discriminator"]
        )
    variables = dict(state.variables)
    if "anchors" in variables:
        variables["anchors"] = adversarial.Anchors(jnp.float32(-0.1), jnp.float32(0.2))
    state = state._replace(params=start, variables=variables, step=jnp.int32(1))
    after, metrics = jax.jit(task.step)(state, task.frozen, {"image": IMAGES})
    return state, after, metrics


def difference(before, after):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, after)


def assert_relative(ours, theirs, tolerance=1e-3):
    """Largest difference of each array against the largest gradient of them all."""
    scale = max(np.abs(x).max() for x in theirs.values())
    assert ours.keys() == theirs.keys() and scale > 0
    worst = max(np.abs(ours[name] - theirs[name]).max() for name in ours) / scale
    assert worst < tolerance, worst


ADVERSARIES = {
    "hinge_batch": {"loss": "hinge", "norm": "batch", "lecam": 0.2, "weight": 0.6},
    "vanilla_fixed_weight": {"loss": "vanilla", "norm": "none", "adaptive": False, "weight": 0.3, "r1": 0.3},
    "non_saturating": {"loss": "non_saturating", "norm": "none", "optimizer": {"learning_rate": 2.0}},
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_a_step_against_a_discriminator_has_the_gradients_of_torch(name):
    original, module, params = kl_pair()
    block = ADVERSARIES[name]
    before, after, metrics = one_step(
        module,
        params,
        learned_variance=True,
        kl_weight=1e-2,
        kl_warmup_images=2 * BATCH,  # after one step, half of it
        perceptual={"name": "lpips:a,b", "weight": 0.8},
        adversarial={"width": 4, "layers": 1, **block},
    )
    settings = {"adaptive": True, "weight": 0.5, "r1": 0.0, "lecam": 0.0, "optimizer": {}, **block}

    x = nchw(from_uint8(jnp.asarray(IMAGES)))
    critic = to_torch(before.params["discriminator"])
    s = torch.tensor(-0.7, requires_grad=True)
    posterior = original.encode(x).latent_dist
    eps = nchw(jax.random.normal(step_key(before), (BATCH, SIDE // 2, SIDE // 2, 2)))
    y = original.decode(posterior.mean + posterior.std * eps).sample
    pools = (torch.tensor(CHANNELS)[:, None, None] * F.avg_pool2d(x - y, 4).square()).mean()
    nll = ((x - y).abs().mean() + 0.8 * pools) * torch.exp(-s) + s
    kl = posterior.kl().sum() / x.numel()
    fake = discriminate(critic, settings["norm"], y)
    fooled = F.softplus(-fake).mean() if settings["loss"] == "non_saturating" else -fake.mean()
    weight = torch.tensor(settings["weight"])
    if settings["adaptive"]:
        last = original.decoder.conv_out.weight
        norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, fooled)]
        weight = weight * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
    loss = nll + 0.5e-2 * kl + weight * fooled
    loss.backward()
    for leaf in jax.tree.leaves(critic):
        leaf.grad = None

    real_x = x.clone().requires_grad_(True)
    real, fake = discriminate(critic, settings["norm"], real_x), discriminate(critic, settings["norm"], y.detach())
    if settings["loss"] == "hinge":
        critic_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    else:
        critic_loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    if settings["r1"]:
        slope = torch.autograd.grad(real.mean((1, 2, 3)).sum(), real_x, create_graph=True)[0]
        critic_loss = critic_loss + 0.5 * settings["r1"] * slope.square().sum((1, 2, 3)).mean()
    if settings["lecam"]:
        regular = F.relu(real - 0.2).square().mean() + F.relu(-0.1 - fake).square().mean()
        critic_loss = critic_loss + settings["lecam"] * regular
    critic_loss.backward()

    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4)
    np.testing.assert_allclose(metrics["discriminator_loss"], critic_loss.item(), rtol=1e-4)
    np.testing.assert_allclose(metrics["adversarial_weight"], weight.item(), rtol=1e-3)
    moved = difference(before.params, after.params)
    assert_relative(
        weights.to_state(module, moved["autoencoder"]),
        {name: parameter.grad.numpy() for name, parameter in original.named_parameters()},
    )
    np.testing.assert_allclose(moved["error"]["log_variance"], s.grad.item(), rtol=1e-3)
    rate = settings["optimizer"].get("learning_rate", 1.0)
    flat = [
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (moved["discriminator"], jax.tree.map(lambda leaf: rate * leaf.grad.numpy(), critic))
    ]
    assert_relative(*flat)
    if settings["lecam"]:
        real_mean = -0.1 + (1 - adversarial.DECAY) * (real.mean().item() + 0.1)
        np.testing.assert_allclose(after.variables["anchors"].real, real_mean, rtol=1e-4)


def test_a_step_of_a_vq_autoencoder_has_the_gradients_of_torch():
    original, module, params = vq_pair()
    before, after, _ = one_step(module, params, reconstruction="l2", commitment=0.4)
    x = nchw(from_uint8(jnp.asarray(IMAGES)))
    z = original.encode(x).latents
    entries = original.quantize.embedding.weight
    rows = z.permute(0, 2, 3, 1)
    e = entries[torch.cdist(rows.reshape(-1, 3), entries).argmin(1)].reshape(rows.shape).permute(0, 3, 1, 2)
    y = original.decode(z + (e - z).detach(), force_not_quantize=True).sample
    loss = F.mse_loss(y, x) + F.mse_loss(e, z.detach()) + 0.4 * F.mse_loss(z, e.detach())
    loss.backward()
    moved = difference(before.params, after.params)
    assert_relative(
        weights.to_state(module, moved["autoencoder"]),
        {name: parameter.grad.numpy() for name, parameter in original.named_parameters()},
    )


def test_a_step_with_aligned_latents_has_the_gradients_of_torch(monkeypatch):
    original, module, params = kl_pair()

    def features(params, x, side):
        return params * x.reshape(len(x), side, 2, side, 2, 3).mean((2, 4))

    monkeypatch.setattr(alignment, "load_features", lambda name, load: (features, CHANNELS))
    before, after, metrics = one_step(module, params, align={"name": "dinov2:DIR", "weight": 0.3})
    x = nchw(from_uint8(jnp.asarray(IMAGES)))
    posterior = original.encode(x).latent_dist
    eps = nchw(jax.random.normal(step_key(before), (BATCH, SIDE // 2, SIDE // 2, 2)))
    z = posterior.mean + posterior.std * eps
    nll = (x - original.decode(z).sample).abs().mean()
    kernel = torch.tensor(np.asarray(before.params["align"]["kernel"]), requires_grad=True)
    f = F.avg_pool2d(x * torch.tensor(CHANNELS)[:, None, None], 2).flatten(2).mT
    rows = z.flatten(2).mT
    among = [F.cosine_similarity(a[:, :, None], a[:, None], dim=-1) for a in (rows, f)]
    aligned = F.relu(0.5 - F.cosine_similarity(rows @ kernel, f, dim=-1)).mean()
    aligned = aligned + F.relu((among[0] - among[1]).abs() - 0.25).mean()
    last = original.encoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, aligned)]
    weight = 0.3 * norms[0] / (norms[1] + 1e-4)
    (nll + 1e-6 * posterior.kl().sum() / x.numel() + weight * aligned).backward()
    np.testing.assert_allclose(metrics["align"], aligned.item(), rtol=1e-4)
    moved = difference(before.params, after.params)
    assert_relative(
        weights.to_state(module, moved["autoencoder"]),
        {name: parameter.grad.numpy() for name, parameter in original.named_parameters()},
    )
    assert_relative(moved["align"], {"kernel": kernel.grad.numpy()})


@pytest.mark.parametrize(
    "pair, published, settings",
    [
        (kl_pair, diffusers.AutoencoderKL, {"adversarial": {"width": 4, "layers": 1}}),
        (vq_pair, diffusers.VQModel, {"codebook_decay": 0.9, "revive_after": 8}),
    ],
)
def test_what_was_trained_reconstructs_the_same_in_diffusers(tmp_path, pair, published, settings):
    _, module, params = pair()
    _, after, _ = one_step(module, params, **settings)
    trained = after.params["autoencoder"]
    weights.save(tmp_path / "out", module, trained)
    theirs = published.from_pretrained(tmp_path / "out").eval()
    ours = make(module, **settings).pictures(after.params, {}, {"image": IMAGES}, None)
    with torch.no_grad():
        x = nchw(ours["data"])
        y = theirs(x).sample
    np.testing.assert_allclose(ours["reconstructions"], y.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    assert functools.reduce(max, map(np.max, jax.tree.leaves(difference(params, trained)))) > 0
