"""Norms and AdamW by apex against torch's, where that package is.

pytest -m gpu
"""

import importlib.util

import pytest
import torch
from torch import nn

from megatron_lite.optimizer import MegatronOptimizer, OptimizerConfig
from megatron_lite.transformer.norms import build_norm
from megatron_lite.transformer.transformer_config import TransformerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("amp_C") is None,
        reason="needs a CUDA device and the package apex with its extensions",
    ),
]


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norms(normalization):
    """Output, and gradients of input and weights, to bfloat16's rounding."""

    def results(impl):
        torch.manual_seed(0)
        sizes = {"num_layers": 1, "hidden_size": 256, "num_attention_heads": 4, "bf16": True}
        norm = build_norm(TransformerConfig(**sizes, normalization=normalization, norm_impl=impl), 256).cuda()
        x = torch.randn(128, 2, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
        output = norm(x)
        factor = torch.randn_like(output)
        return [output, *torch.autograd.grad((output * factor).sum(), [x, *norm.parameters()])]

    for found, wanted in zip(results("apex"), results("torch"), strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).float().norm() <= 2e-2 * wanted.float().norm()


def test_adamw():
    """Weights and moments after steps, one of them skipped, to float32's rounding, without a wait of the host."""

    def train(impl):
        torch.manual_seed(0)
        named = {name: nn.Parameter(torch.randn(300, 70, device="cuda")) for name in ("one", "other")}
        optimizer = MegatronOptimizer(OptimizerConfig(lr=0.05, weight_decay=0.1, adam_impl=impl), named)
        for step in range(4):
            for parameter in named.values():
                parameter.grad = torch.randn_like(parameter)
            if step == 2:
                named["one"].grad.fill_(torch.inf)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return {**{name: one.detach() for name, one in named.items()}, **optimizer.state_dict()}

    wanted = train("torch")
    for name, found in train("apex").items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-5, atol=1e-6)
