"""models.inputs: what every network takes is enough to make its variables, and nothing less is."""

import inspect

import flax.linen as nn
import jax
import numpy as np
import pytest

from ldm_jax import models
from ldm_jax.models.clip import CLIPText, CLIPVision
from ldm_jax.models.dit import DiT
from ldm_jax.models.unet import UNet

OPTIONS = {"CLIP": {"text": CLIPText(projection_dim=8), "vision": CLIPVision(projection_dim=8)}}
OPTIONS["UNet"] = {"cross_attention_dim": 8}
TINY_UNET = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


@pytest.mark.parametrize("network", models.INPUTS, ids=lambda network: network.__name__)
def test_every_network_is_made_of_what_it_takes(network):
    module = network(**OPTIONS.get(network.__name__, {}))
    takes = models.inputs(module)
    arguments = inspect.signature(network.__call__).parameters
    assert list(takes) == list(arguments)[1 : 1 + len(takes)]
    assert all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(takes))
    assert jax.tree.leaves(models.shapes(module)["params"])


@pytest.mark.parametrize(
    ("options", "cond"),
    [
        ({}, {}),
        ({"num_class_embeds": 5}, {"label": ((1,), np.int32)}),
        ({"class_embed_type": "timestep"}, {"label": ((1,), np.float32)}),
        ({"class_embed_type": "identity"}, {"label": ((1, 32), np.float32)}),
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
            {"label": ((1, 6), np.float32)},
        ),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 10,
            },
            {"time_ids": ((1, 1), np.float32), "pooled": ((1, 6), np.float32)},
        ),
    ],
)
def test_conditions_of_a_unet_follow_its_options(options, cond):
    """Each entry is needed: without it the network refuses to run."""
    module = UNet(**TINY_UNET, **options)
    takes = models.inputs(module)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in takes["cond"].items()} == cond
    models.shapes(module)
    for name in cond:
        rest = {key: value for key, value in takes["cond"].items() if key != name}
        with pytest.raises(ValueError, match=f"cond lacks '{name}'"):
            jax.eval_shape(module.init, jax.random.key(0), **takes | {"cond": rest})


def test_a_shape_may_be_asked_for():
    learned = DiT(hidden_size=8, depth=1, num_heads=2, pos_embed="learned", num_classes=3, text_dim=5)
    takes = models.inputs(learned, (6, 4, 4))
    assert takes["x"].shape == (1, 6, 4, 4) and takes["cond"]["text"].shape == (1, 1, 5)
    assert models.shapes(learned, (6, 4, 4))["params"]["position"].shape == (6, 8)
    assert models.inputs(CLIPText(), (7,))["tokens"].shape == (1, 7)


def test_new_variables_do_not_depend_on_the_data():
    module, key = UNet(**TINY_UNET, num_class_embeds=5), jax.random.key(0)
    ours = jax.jit(lambda: models.init(module, key))()
    x = np.ones((2, 4, 4, 4), np.float32)
    theirs = jax.jit(module.init)(key, x, np.ones(2, np.float32), {"label": np.ones(2, np.int32)})
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_is_not_known_is_said():
    with pytest.raises(
        ValueError, match=r"Dense: what it takes is not known; expected a type of models.INPUTS: AutoencoderKL"
    ):
        models.inputs(nn.Dense(3))
    with pytest.raises(ValueError, match="UNet: cross_attention_dim is None, expected the number of channels"):
        models.inputs(UNet())
