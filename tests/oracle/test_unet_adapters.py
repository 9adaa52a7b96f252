"""What adapters give a U-Net, against diffusers: the feature maps of ControlNet and T2I-Adapter, the keys and values of IP-Adapter."""

import functools

import jax
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor

from ldm_jax.diffusion.denoiser import make_branches
from ldm_jax.diffusion.process import PROCESSES
from ldm_jax.models.spatial_attention import KeyValues
from ldm_jax.models.unet_options import cross_attentions
from tests.oracle import test_unet as unets

pytestmark = pytest.mark.oracle
build = functools.cache(unets.build)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def feature_maps():
    """For the network 'sdxl_refiner' on 8 x 16: of every skip connection, of every level, of the middle."""
    random = np.random.default_rng(1)

    def normal(height, width, channels):
        return random.normal(size=(3, height, width, channels)).astype(np.float32)

    skips = [normal(8, 16, 4), normal(8, 16, 4), normal(4, 8, 4), normal(4, 8, 8), normal(2, 4, 8), normal(2, 4, 16)]
    # Levels without attention are halved first, if at all; the one with cross-attention is not.
    return skips, [normal(4, 8, 4), normal(4, 8, 8), normal(2, 4, 16)], normal(2, 4, 16)


def test_feature_maps_of_controlnet_and_t2i_adapter():
    original, ours, params = build("sdxl_refiner")
    x, t, cond, keywords = unets.inputs("sdxl_refiner")
    skips, levels, middle = feature_maps()
    with torch.no_grad():
        expected = (
            original(
                nchw(x),
                torch.tensor(t),
                **keywords,
                down_block_additional_residuals=[nchw(m) for m in skips],
                mid_block_additional_residual=nchw(middle),
                down_intrablock_additional_residuals=[nchw(m) for m in levels],
            )
            .sample.permute(0, 2, 3, 1)
            .numpy()
        )
        without = original(nchw(x), torch.tensor(t), **keywords).sample.permute(0, 2, 3, 1).numpy()
    residuals = {"skips": skips, "levels": levels, "middle": middle}
    got = jax.jit(ours.apply)({"params": params}, x, t, cond | {"residuals": residuals})
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert np.abs(expected - without).max() > 0.1


def test_what_does_not_fit_is_named():
    _, ours, params = build("sdxl_refiner")
    x, t, cond, _ = unets.inputs("sdxl_refiner")
    skips, levels, middle = feature_maps()

    def refused(message, **entries):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(ours.apply, {"params": params}, x, t, cond | entries)

    refused(r"has 5 skips, expected 6", residuals={"skips": skips[1:]})
    refused(r"has 2 levels, expected 3", residuals={"levels": levels[1:]})
    refused(
        r"residual of skip 2 is \(3, 8, 16, 4\), expected \(3, 4, 8, 4\)",
        residuals={"skips": [*skips[:2], skips[1], *skips[3:]]},
    )
    refused(
        r"residual of down_blocks_1 is \(3, 2, 4, 16\), expected \(3, 4, 8, 8\)",
        residuals={"levels": [levels[0], levels[2], levels[2]]},
    )
    refused(r"residual of the middle is \(3, 4, 8, 8\)", residuals={"middle": levels[1]})
    refused(r"holds \['mid'\], expected skips, middle or levels", residuals={"mid": middle})
    refused(r"names 'mid_block', which is no block with cross-attention", key_values={"mid_block": ()})


@pytest.mark.parametrize("scan_layers", [False, True])
def test_keys_and_values_of_ip_adapter(scan_layers):
    """Two image prompts of 3 and 4 tokens, which the cross-attention sees beside the text, each with a scale."""
    original, ours, params = unets.build("two blocks")  # its attention is changed below
    x, t, cond, keywords = unets.inputs("two blocks")
    random = np.random.default_rng(2)
    states = [random.normal(size=(3, n, 6)).astype(np.float32) for n in (3, 4)]
    scales = [0.6, 1.5]
    torch.manual_seed(3)
    processors, key_values = {}, {}
    for name, processor in original.attn_processors.items():
        if "attn1" in name:
            processors[name] = processor
            continue
        width = original.get_submodule(name.removesuffix(".processor")).to_q.out_features
        processors[name] = made = IPAdapterAttnProcessor(width, 6, (3, 4), scales)
        path = name.removesuffix(".attn2.processor")
        for part in ("down_blocks", "up_blocks", "attentions", "transformer_blocks"):
            path = path.replace(f"{part}.", f"{part}_")
        with torch.no_grad():
            key_values[path.replace(".", "/")] = [
                KeyValues(
                    made.to_k_ip[i](torch.tensor(s)).numpy(),
                    made.to_v_ip[i](torch.tensor(s)).numpy(),
                    np.full(3, scale, np.float32),
                )
                for i, (s, scale) in enumerate(zip(states, scales))
            ]
    # The order of diffusers is another: its middle comes last.
    assert set(key_values) == set(cross_attentions(ours)) and len(key_values) == len(cross_attentions(ours))
    with torch.no_grad():
        without = original(nchw(x), torch.tensor(t), **keywords).sample.permute(0, 2, 3, 1).numpy()
    original.set_attn_processor(processors)
    text = keywords.pop("encoder_hidden_states")
    with torch.no_grad():
        expected = (
            original(
                nchw(x), torch.tensor(t), encoder_hidden_states=(text, [torch.tensor(s) for s in states]), **keywords
            )
            .sample.permute(0, 2, 3, 1)
            .numpy()
        )
    assert np.abs(expected - without).max() > 0.1
    if scan_layers:
        ours, params = ours.copy(scan_layers=True), stacked(params)
    got = jax.jit(ours.apply)({"params": params}, x, t, cond | {"key_values": key_values})
    np.testing.assert_allclose(got, expected, atol=2e-4)


def stacked(params):
    """The transformer blocks of each attention as one, with a leading axis."""
    if not isinstance(params, dict):
        return params
    names = sorted(name for name in params if name.startswith("transformer_blocks_"))
    rest = {name: stacked(value) for name, value in params.items() if name not in names}
    if not names:
        return rest
    return rest | {"transformer_blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *(params[n] for n in names))}


def test_guidance_goes_over_them_too():
    """Branches of one network call: each row has its own feature maps."""
    seen = {}

    def apply(params, x, t, cond):
        seen.update(cond)
        return x + cond["residuals"]["levels"][0]

    maps = [np.full((2, 1), value, np.float32) for value in (1.0, 5.0)]
    conds = [{"residuals": {"levels": [m]}} for m in maps]
    branches = make_branches(apply, {}, PROCESSES["flow"](), "x", *conds)
    first, second = branches(np.zeros((2, 1), np.float32), np.full(2, 0.5, np.float32))
    np.testing.assert_array_equal(first.x, maps[0])
    np.testing.assert_array_equal(second.x, maps[1])
    assert seen["residuals"]["levels"][0].shape == (4, 1)
    with pytest.raises(ValueError, match="branch 1's 'residuals' is made of other parts than that of branch 0"):
        make_branches(apply, {}, PROCESSES["flow"](), "x", conds[0], {"residuals": {"middle": maps[0]}})
