"""The terms of VA-VAE against loops over pixels, and the networks that features may come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import weights
from ldm_jax.models.autoencoder_tiny import AutoencoderTiny
from ldm_jax.models.classifier import Classifier
from ldm_jax.models.dinov2 import Dinov2
from ldm_jax.training import frozen_networks
from ldm_jax.training.task import Context
from ldm_jax.training.terms import alignment

RANDOM = np.random.default_rng(0)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_the_loss_is_that_of_equations_2_and_3():
    z, f = RANDOM.normal(size=(2, 3, 2, 4)), RANDOM.normal(size=(2, 3, 2, 6))
    kernel = RANDOM.normal(size=(4, 6))
    terms = []
    for rows, seen in zip(z.reshape(2, 6, 4), f.reshape(2, 6, 6)):
        terms.append(np.mean([max(0, 0.5 - cosine(a @ kernel, b)) for a, b in zip(rows, seen)]))
        pairs = [(i, j) for i in range(6) for j in range(6)]
        apart = [abs(cosine(rows[i], rows[j]) - cosine(seen[i], seen[j])) for i, j in pairs]
        terms[-1] += np.mean([max(0, a - 0.25) for a in apart])
    value = alignment.alignment(
        {"kernel": jnp.asarray(kernel, jnp.float32)}, *(jnp.asarray(a, jnp.float32) for a in (z, f))
    )
    np.testing.assert_allclose(value, np.mean(terms), rtol=1e-5)


def test_features_of_a_classifier_and_of_dinov2(tmp_path):
    x = jnp.asarray(RANDOM.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    classifier = Classifier(4, widths=(4, 8), norm_num_groups=2)
    params = classifier.init(jax.random.key(0), x)["params"]
    features, frozen = alignment.load_features("classifier:DIR", {"classifier:DIR": (classifier, params)}.get)
    assert features(frozen, x, 8).shape == (2, 4, 4, 8)

    module = Dinov2(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    params = module.init(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    weights.save(tmp_path / "dino", module, params)
    features, frozen = alignment.load_features(f"dinov2:{tmp_path / 'dino'}", frozen_networks.load)
    # Images of 4 x 14 pixels: nothing is resized, and each patch is a pixel of the latent.
    x = jnp.asarray(RANDOM.uniform(0, 1, (1, 56, 56, 3)), jnp.float32)
    tokens = module.apply({"params": params}, (x - alignment.MEAN) / alignment.STD).last_hidden_state[:, 1:]
    np.testing.assert_allclose(features(frozen, 2 * x - 1, 4), tokens.reshape(1, 4, 4, 8), atol=1e-5)

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4,),
        decoder_block_out_channels=(4,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    )
    weights.save(tmp_path / "tiny", tiny, tiny.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])
    context = Context(load=frozen_networks.load)
    for name, said in (
        ("clip:DIR", "is 'clip:DIR'; expected dinov2:DIR"),
        (f"dinov2:{tmp_path / 'tiny'}", "AutoencoderT"),
    ):
        with pytest.raises(ValueError, match=said):
            alignment.make(context, name=name)
    with pytest.raises(ValueError, match=r"task\.align\.weight is 0"):
        alignment.make(context, name="classifier:DIR", weight=0)
