"""Attention with a bias and a scale against torch's, and against the self-attention of transformers' T5."""

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from ldm_jax.kernels.attention import attention

pytestmark = pytest.mark.oracle


def test_as_torch_adds_and_scales():
    r = np.random.RandomState(0)
    q, k, v = (r.randn(2, n, 3, 8).astype(np.float32) for n in (6, 5, 5))
    bias = r.randn(1, 3, 6, 5).astype(np.float32)
    heads_first = (torch.tensor(x).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, torch.tensor(bias), scale=0.3)
    for implementation in ("einsum", "chunked", "xla"):
        got = attention(q, k, v, bias=bias, scale=0.3, implementation=implementation)
        np.testing.assert_allclose(got, expected.transpose(1, 2), atol=1e-6)


def test_relative_positions_of_t5():
    config = transformers.T5Config(d_model=12, d_kv=4, num_heads=3, relative_attention_num_buckets=6)
    torch.manual_seed(0)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    x = torch.randn(2, 9, 12)
    with torch.no_grad():
        expected = theirs(x)[0].numpy()
        q, k, v = (getattr(theirs, name)(x).reshape(2, 9, 3, 4).numpy() for name in "qkv")
        bias = theirs.compute_bias(9, 9).numpy()
    assert bias.shape == (1, 3, 9, 9) and np.abs(bias).max() > 0.1
    got = jax.jit(lambda *a: attention(*a, bias=bias, scale=1.0))(q, k, v).reshape(2, 9, 12)
    np.testing.assert_allclose(got @ theirs.o.weight.detach().numpy().T, expected, atol=1e-5)
