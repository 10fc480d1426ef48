"""Layers by Transformer Engine against torch's, where that package is.

pytest -m gpu
"""

import importlib.util

import pytest
import torch

from megatron_lite.transformer.transformer_config import TransformerConfig
from megatron_lite.transformer.transformer_layer import TransformerLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
        reason="needs a CUDA device and the package transformer_engine",
    ),
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_query_groups": 2, "gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm"},
        {"window_size": (32, 0)},
        {"recompute_granularity": "selective"},
    ],
    ids=str,
)
def test_a_layer_computes_the_same(settings):
    """Output, and gradients of input and weights, to bfloat16's rounding."""

    def results(impl):
        torch.manual_seed(0)
        sizes = {"num_layers": 1, "hidden_size": 256, "num_attention_heads": 4, "bf16": True}
        layer = TransformerLayer(TransformerConfig(**sizes, **settings, transformer_impl=impl)).cuda()
        x = torch.randn(128, 2, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
        output = layer(x)
        factor = torch.randn_like(output)
        return [output, *torch.autograd.grad((output * factor).sum(), [x, *layer.parameters()])]

    for found, wanted in zip(results("transformer_engine"), results("local"), strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).float().norm() <= 2e-2 * wanted.float().norm()
